"""A user's scripts for Hugging Face's Trainer and TRL's SFTTrainer, with `optimizers=(SparseAdamW(...), scheduler)`."""

import copy

import pytest
import torch

from surgery.models import load
from surgery.tuning import SparseAdamW, select

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
torch.set_num_threads(1)
STEPS = 8


@pytest.fixture(scope="module")
def base():
    return load("tiny-base")


def rows():
    """Sums without a carry: what the base model can't do yet."""
    return [f"c {a}{b}={b}{a}#" for a in "abcdefgh" for b in "ijklmnop"]


def tokenized(tokenizer):
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}
            for ids in (tokenizer(row)["input_ids"] for row in rows())]  # fmt: skip


def settings(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "report_to": "none",
        "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "bf16": False,
        "gradient_checkpointing": False,
    } | more  # fmt: skip


def parts(base, chosen=None, **more):
    """What the script makes: the model, the optimizer over 5 % of it, and a scheduler."""
    from transformers import get_linear_schedule_with_warmup

    model = copy.deepcopy(base[0])
    chosen = chosen or select(model, "lift", density=0.05)
    optimizer = SparseAdamW(model, chosen, **({"lr": 5e-3} | more))
    return model, optimizer, get_linear_schedule_with_warmup(optimizer, 2, STEPS)


def trainer(base, folder, *, chosen=None, words=None, **more):
    from transformers import Trainer, TrainingArguments

    model, optimizer, scheduler = parts(base, chosen, **more)
    made = Trainer(model=model, args=TrainingArguments(**settings(folder, **(words or {}))),
                   train_dataset=tokenized(base[1]), optimizers=(optimizer, scheduler))  # fmt: skip
    return made, model, optimizer


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def only_the_chosen_moved(model, base, chosen):
    masks, moved = chosen.masks(), 0
    for (name, p), q in zip(model.named_parameters(), base[0].parameters(), strict=True):
        same = (p == q).view(-1)
        outside = ~masks[name].view(-1) if name in masks else torch.ones_like(same)
        assert bool(same[outside].all()), name
        moved += int((~same).sum())
    assert moved > 0.9 * chosen.count


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("words", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True},
                                   {"gradient_checkpointing": True}])  # fmt: skip
def test_a_trainer_script_trains_five_per_cent_and_nothing_else(base, tmp_path, words):
    made, model, optimizer = trainer(base, tmp_path, words=words)
    made.train()
    first, last = losses(made)[0], losses(made)[-1]
    assert last < 0.9 * first
    only_the_chosen_moved(model, base, optimizer.selection)
    assert int(optimizer.state[optimizer.flat]["step"]) == STEPS
    assert made.optimizer.param_groups[0]["lr"] == 0  # the scheduler went its way


def test_a_model_in_bfloat16_keeps_float32_values_of_what_it_trains(base, tmp_path):
    half = (copy.deepcopy(base[0]).bfloat16(), base[1])
    made, model, optimizer = trainer(half, tmp_path, words={"bf16": True})
    made.train()
    assert losses(made)[-1] < 0.9 * losses(made)[0]
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert optimizer.state[optimizer.flat]["master"].dtype == torch.float32
    masks = optimizer.selection.masks()
    for (name, p), q in zip(model.named_parameters(), half[0].parameters(), strict=True):
        assert torch.equal(p[~masks[name]], q[~masks[name]]) if name in masks else torch.equal(p, q)


def test_trainers_own_scheduler_and_numbers_equal_a_loop_by_hand(base, tmp_path):
    """Eight steps of Trainer are eight steps of the loop that one writes oneself: bit for bit."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments, get_constant_schedule

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    model, optimizer, _ = parts(base)
    made = InOrder(model=model, args=TrainingArguments(**settings(tmp_path, lr_scheduler_type="constant")),
                   train_dataset=tokenized(base[1]), optimizers=(optimizer, None))  # fmt: skip
    made.train()
    by_hand, other, _ = parts(base)
    get_constant_schedule(other)
    data = tokenized(base[1])
    by_hand.train()
    for at in range(0, 8 * STEPS, 8):
        ids = torch.tensor([row["input_ids"] for row in data[at : at + 8]])
        by_hand(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        other.step()
        other.zero_grad()
    assert equal(model, by_hand)


@pytest.mark.parametrize("same_choice", [True, False])
def test_going_on_from_trainers_checkpoint_equals_a_straight_run(base, tmp_path, same_choice):
    """The selection is in the optimizer's state: a script that chooses differently when it is started again goes on
    with what was chosen then."""
    straight, model, _ = trainer(base, tmp_path / "straight")
    straight.train()
    broken, _, chosen = trainer(base, tmp_path / "broken", words={"save_strategy": "steps", "save_steps": 3})
    broken.train()
    assert (
        torch.load(tmp_path / "broken/checkpoint-3/optimizer.pt", weights_only=True)["state"][0]["exp_avg"].dim() == 1
    )
    other = None if same_choice else select(base[0], "random", density=0.01)
    again, resumed, optimizer = trainer(base, tmp_path / "broken", chosen=other, words={"save_strategy": "no"})
    again.train(resume_from_checkpoint=str(tmp_path / "broken/checkpoint-3"))
    assert equal(model, resumed) and optimizer.selection.overlap(chosen.selection) == 1
    assert [round(x, 4) for x in losses(again)[3:]] == [round(x, 4) for x in losses(straight)[3:]]


def test_trainer_clips_parameters_that_have_no_gradients_and_clip_does_it(base, tmp_path):
    """Trainer clips `model.parameters()`: their gradients are gathered and gone, so `max_grad_norm` clips nothing, and
    the norm in the log is 0. `clip=` of the optimizer limits the norm of what moves."""
    free, model, _ = trainer(base, tmp_path, words={"max_grad_norm": 1e-6})
    free.train()
    never, unclipped, _ = trainer(base, tmp_path, words={"max_grad_norm": 0.0})
    never.train()
    assert equal(model, unclipped)
    assert {entry["grad_norm"] for entry in free.state.log_history if "grad_norm" in entry} == {0.0}
    by_optimizer, clipped, optimizer = trainer(base, tmp_path, clip=1e-9, eps=1e-3)
    by_optimizer.train()
    far = max(float((p - q).abs().max()) for p, q in zip(clipped.parameters(), base[0].parameters(), strict=True))
    assert far < STEPS * 5e-3 * 1e-5  # gradients of 1e-9 against an eps of 1e-3
    only = {n for n, p in clipped.named_parameters() if p.requires_grad}
    assert only <= set(optimizer.selection)  # projections make theirs by themselves


@pytest.mark.parametrize("method, words", [("lift", {}), ("s2ft", {}), ("half", {}), ("lift", {"bf16": True})])
def test_an_sft_script_of_trl_trains_what_was_chosen_and_nothing_else(base, tmp_path, method, words):
    from datasets import Dataset
    from transformers import get_constant_schedule

    model, tokenizer = copy.deepcopy(base[0]), base[1]
    chosen = select(model, method, **({} if method == "half" else {"density": 0.05}))
    optimizer = SparseAdamW(model, chosen, lr=5e-3)
    made = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, max_length=32, **words)),
        train_dataset=Dataset.from_list([{"prompt": row[:5], "completion": row[5:]} for row in rows()]),
        processing_class=tokenizer,
        optimizers=(optimizer, get_constant_schedule(optimizer)),
    )
    made.train()
    assert losses(made)[-1] < 0.9 * losses(made)[0]
    masks = chosen.masks()
    for (name, p), q in zip(model.named_parameters(), base[0].parameters(), strict=True):
        assert torch.equal(p[~masks[name]], q[~masks[name]]) if name in masks else torch.equal(p, q), name
    assert int(optimizer.state[optimizer.flat]["step"]) == STEPS


def test_an_sft_script_goes_on_from_its_checkpoint(base, tmp_path):
    from datasets import Dataset
    from transformers import get_constant_schedule

    def run(folder, resume=None, **words):
        model = copy.deepcopy(base[0])
        optimizer = SparseAdamW(model, select(model, "lift", density=0.05), lr=5e-3)
        data = Dataset.from_list([{"prompt": row[:5], "completion": row[5:]} for row in rows()])
        made = trl.SFTTrainer(model=model, args=trl.SFTConfig(**settings(folder, max_length=32, **words)),
                              train_dataset=data, processing_class=base[1],
                              optimizers=(optimizer, get_constant_schedule(optimizer)))  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path / "a")
    run(tmp_path / "b", save_strategy="steps", save_steps=3)
    assert equal(straight, run(tmp_path / "b", resume=str(tmp_path / "b/checkpoint-3")))
