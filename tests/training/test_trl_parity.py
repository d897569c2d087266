"""Losses held against TRL 1.16's own trainers, on the same tiny Llama and the same tokens.

Observed on CPU in float32: at most 5e-7 for every combination below.
"""

import pytest
import torch
from helpers import real_llama, words

from surgery.training.batch import Batch
from surgery.training.data import demonstrations, pairs
from surgery.training.objectives import BNPO, DAPO, DPO, GRPO, ORPO, SFT, DrGRPO
from surgery.training.policy import Policy

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason="TRL's private methods change: 1.16 is meant"),
    pytest.mark.filterwarnings("ignore"),
]
TOLERANCE = 1e-6
OURS = {"grpo": GRPO, "bnpo": BNPO, "dr_grpo": DrGRPO, "dapo": DAPO}
ROWS = [{"prompt": f"w{i} w{i + 1} w3 ", "completion": " ".join(words(40)[5 : 7 + i])} for i in range(4)]
PAIRS = [{"prompt": f"w{i} w4 ", "chosen": f"w{i} w7 w8", "rejected": f"w9 w{i}"} for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real_llama(tmp_path_factory.mktemp("parity") / "model", seed=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def plain(tmp, **more):
    """What all of TRL's configs are told: float32 on the CPU, nothing written."""
    return {
        "output_dir": str(tmp), "max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, **more,
    }  # fmt: skip


@pytest.fixture(scope="module", params=[1.0, 0.7], ids=["T=1", "T=0.7"])
def grpo(request, folder, tokenizer, tmp_path_factory):
    """A GRPOTrainer for a temperature, which it bakes into the model's head; the tests change its other attributes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    args = trl.GRPOConfig(
        **plain(tmp_path_factory.mktemp("grpo"), per_device_train_batch_size=8),
        num_generations=4, max_completion_length=6, temperature=request.param,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [row["prompt"] for row in ROWS]}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def rollouts(masked=()):
    """8 rows: prompt 5 (row 0 padded by 2 on the left), completions of 1 to 6 tokens; `masked` rows have no loss."""
    generator = torch.Generator().manual_seed(7)

    def ids(n):
        return torch.randint(4, 40, (n,), generator=generator).tolist()

    masks = None
    prompts = [ids(3 if i == 0 else 5) for i in range(8)]
    answers = [ids(n) for n in (6, 1, 2, 3, 4, 5, 6, 2)]
    if masked:
        masks = [[0.0] * len(a) if i in masked else [1.0] * len(a) for i, a in enumerate(answers)]
    batch = Batch.of(prompts, answers, pad=3, masks=masks, max_new_tokens=6)
    batch["advantage"] = torch.randn(8, generator=generator)
    for name in ("old_log_probs", "ref_log_probs"):
        batch[name] = -5.3 + 0.2 * torch.randn(8, 6, generator=generator)
    return batch


def theirs(trainer, batch, *, loss_type, beta, level):
    """TRL's loss of the batch, with gradients left in its model."""
    trainer.loss_type, trainer.beta, trainer.importance_sampling_level = loss_type, beta, level
    trainer.epsilon_low, trainer.epsilon_high = 0.2, 0.28 if loss_type == "dapo" else 0.2
    inputs = {
        "prompt_ids": batch.prompt_ids, "prompt_mask": batch.prompt_mask.long(),
        "completion_ids": batch.completion_ids, "completion_mask": batch.mask.long(),
        "advantages": batch["advantage"], "old_per_token_logps": batch["old_log_probs"],
        "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip
    if beta:
        inputs["ref_per_token_logps"] = batch["ref_log_probs"]
    trainer.model.zero_grad()
    return trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("masked", [(), (2,), tuple(range(8))], ids=["all rows", "a row without loss", "no row"])
@pytest.mark.parametrize("name", OURS)
def test_policy_gradients_are_trls(grpo, model, name, masked):
    batch = rollouts(masked)
    batch.temperature = grpo.temperature
    for beta in (0.0, 0.04):
        for level in ("token", "sequence"):
            objective = OURS[name](beta=beta, ratio=level, kl_unbiased=True)
            model.zero_grad()
            mine = objective.loss(Policy(model), batch).value
            other = theirs(grpo, batch, loss_type=name, beta=beta, level=level)
            assert float(mine.detach()) == pytest.approx(float(other.detach()), abs=TOLERANCE)
            if len(masked) == 8:
                assert float(mine.detach()) == 0.0
                continue
            mine.backward()
            other.backward()
            for p, q in zip(model.parameters(), grpo.model.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_sft_is_trls(model, tokenizer, tmp_path):
    from datasets import Dataset

    args = trl.SFTConfig(**plain(tmp_path, per_device_train_batch_size=4))
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    found = next(iter(trainer.get_train_dataloader()))
    batch = demonstrations(ROWS, tokenizer)
    assert int((found["labels"] != -100).sum()) == batch.mask.sum()  # the same tokens are learned, end mark included
    other = trainer.compute_loss(trainer.model, dict(found))
    mine = SFT().loss(Policy(model), batch).value
    assert float(mine.detach()) == pytest.approx(float(other.detach()), abs=TOLERANCE)


def preference_parity(trainer, model, tokenizer, objective, tolerance=TOLERANCE):
    """Our loss and theirs on the rows as TRL's own loader shuffled them."""
    trainer.model.eval()
    found = next(iter(trainer.get_train_dataloader()))
    other = trainer.compute_loss(trainer.model, dict(found))
    batch = pairs(PAIRS, tokenizer).with_totals()
    if objective.uses_reference:
        with torch.no_grad():
            batch["ref_log_probs"] = Policy(trainer.ref_model)(batch).log_probs
    mine = objective.loss(Policy(model), batch).value
    assert float(mine.detach()) == pytest.approx(float(other.detach()), abs=tolerance)
    return float(mine.detach())


def test_dpo_is_trls(model, folder, tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**plain(tmp_path, per_device_train_batch_size=4, beta=0.1)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    assert abs(preference_parity(trainer, model, tokenizer, DPO(beta=0.1)) - 0.6931) > 0.01


def test_orpos_odds_ratio_is_trls(model, tokenizer, tmp_path):
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = orpo.ORPOTrainer.__new__(orpo.ORPOTrainer)
    trainer.beta, trainer.accelerator = 0.1, type("", (), {"device": "cpu"})
    chosen, rejected = torch.tensor([-0.3, -2.0, -5.0]), torch.tensor([-0.9, -1.0, -0.01])
    losses, *_ = trainer.odds_ratio_loss(chosen, rejected)
    batch = Batch.of([[4]] * 6, [[5]] * 6, kind="pairs", group=2)
    scores = torch.stack([chosen, rejected], 1).flatten()[:, None]
    mine = ORPO(lam=0.1).of_scores(type("Scores", (), {"log_probs": scores})(), batch)
    assert float(mine.value) == pytest.approx(float(-losses.mean() - chosen.mean()), abs=TOLERANCE)
