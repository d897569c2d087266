"""Inside the claims about half fine-tuning."""

import copy

import torch

EXPERIMENT = "half_tuning"


def test_a_reset_half_is_the_base_bit_for_bit(experiment):
    from surgery import zoo
    from surgery.training.run import open_model

    base, _ = open_model(zoo.get("tiny-base"))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 1
    start, end = dict(base.named_parameters()), dict(tuned.named_parameters())
    seen = {}
    for kind, weights in experiment.resets(base, tuned, seed=3):
        assert set(weights) == set(start)
        same = sum(int((weights[n] == start[n]).sum()) for n in start)
        moved = sum(int((weights[n] == end[n]).sum()) for n in start)
        seen.setdefault(kind, []).append((same, moved, sum(p.numel() for p in start.values())))
    assert set(seen) == set(experiment.RESETS)
    for kind, counts in seen.items():
        for same, moved, total in counts:
            if kind == "half of the change":
                assert same == moved == 0
            else:  # q, k, v, o are a third of gate, up, down: halves of the tensors are between these of the numbers
                assert same + moved == total and 0.3 < moved / total < 0.75
