"""Inside the claims about LIFT's masks."""

EXPERIMENT = "lift_masks"


def test_masks_and_lora_have_the_same_size():
    from surgery import zoo
    from surgery.training.run import open_model
    from surgery.tuning import select
    from surgery.tuning.decomposed import lora_rank_for, lora_size

    model, _ = open_model(zoo.get("tiny-base"))
    counts = {
        name: select(model, name, density=0.05, **options).count
        for name, options in {"lift": {"rank": 8}, "magnitude": {"direction": "smallest"}, "random": {}}.items()
    }
    assert len(set(counts.values())) == 1
    count = counts["lift"]
    assert abs(lora_size(model, lora_rank_for(model, count)) - count) < 0.02 * count
