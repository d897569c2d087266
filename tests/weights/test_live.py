"""Vectors in a model in memory: what is added, and that every bit comes back."""

import pytest
import torch
from helpers import load_state, real_llama, save_checkpoint, tiny_config
from torch import nn

from surgery.errors import SurgeryError
from surgery.weights.vector import TaskVector


class Small(nn.Module):
    def __init__(self, tied=False, dtype=torch.float32):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.lm_head = nn.Linear(8, 20, bias=False, dtype=dtype)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("steps", torch.arange(3))


def bits(model):
    return {n: t.detach().clone().view(torch.uint8) for n, t in model.state_dict().items() if t.ndim}


def same(a, b):
    return all(a[n].equal(b[n]) for n in a) and a.keys() == b.keys()


def pair(dtype=torch.float32, tied=False, share=1.0):
    torch.manual_seed(0)
    base, tuned = Small(tied, dtype), Small(tied, dtype)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.01 * torch.randn_like(p) * (torch.rand_like(p) < share)
    return base, tuned, TaskVector.between(base, tuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_added_and_undone_bit_for_bit(dtype, share):
    base, tuned, vector = pair(dtype, share=share)
    before = bits(base)
    undo = vector.apply_to(base)
    for (name, p), q in zip(base.named_parameters(), tuned.parameters(), strict=True):
        if dtype in (torch.bfloat16, torch.float16):
            assert p.equal(q), name
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    assert 0 < undo.nbytes <= sum(t.numel() for t in before.values())
    undo()
    assert same(bits(base), before)
    assert undo.nbytes == 0
    undo()
    assert same(bits(base), before)


def test_few_changes_take_little_memory():
    base, _, vector = pair(torch.bfloat16, share=0.02)
    size = sum(p.numel() * 2 for p in base.parameters())
    assert vector.apply_to(base).nbytes < 0.15 * size


def test_within_a_block_and_after_an_exception():
    base, tuned, vector = pair()
    before = bits(base)
    with pytest.raises(RuntimeError, match="inside"), vector.applied(base, 2.0) as inside:
        assert inside is base
        torch.testing.assert_close(base.norm.weight, 1 + 2 * (tuned.norm.weight - 1))
        raise RuntimeError("inside")
    assert same(bits(base), before)


def test_nested_blocks():
    base, _, vector = pair()
    before = bits(base)
    with vector.applied(base), vector.applied(base, -1.0):
        torch.testing.assert_close(base.lm_head.weight.detach(), before["lm_head.weight"].view(torch.float32))
    assert same(bits(base), before)


def test_tied_parameters_are_changed_once():
    base, tuned, vector = pair(tied=True)
    assert "lm_head.weight" not in vector
    vector.apply_to(base)
    torch.testing.assert_close(base.lm_head.weight, tuned.lm_head.weight)
    assert base.lm_head.weight is base.embed_tokens.weight


def test_a_vector_that_unties_is_refused():
    _, _, vector = pair(tied=False)
    tied = Small(tied=True)
    before = bits(tied)
    with pytest.raises(SurgeryError, match="ties 'lm_head.weight' to 'embed_tokens.weight'"):
        vector.apply_to(tied)
    assert same(bits(tied), before)


def test_an_overflow_half_way_leaves_the_model_as_it_was():
    base, tuned, _ = pair(torch.float16)
    with torch.no_grad():
        base.lm_head.weight.fill_(60000)
        tuned.lm_head.weight.fill_(-60000)
    vector = TaskVector.between(base, tuned)
    before = bits(base)
    with pytest.raises(SurgeryError, match="lm_head"):
        vector.apply_to(base, -1.0)
    assert same(bits(base), before)


def test_other_models_are_refused():
    _, _, vector = pair()
    with pytest.raises(SurgeryError, match=r"no tensor 'embed_tokens\.weight'"):
        vector.apply_to(nn.Linear(8, 20))
    odd = Small()
    odd.norm = nn.LayerNorm(9)
    with pytest.raises(SurgeryError, match=r"\[9\] in the model, \[8\]"):
        vector.apply_to(odd)


def test_gradients_and_autograd_are_left_alone():
    base, _, vector = pair()
    loss = base.lm_head(base.norm(base.embed_tokens(torch.arange(4)))).sum()
    with vector.applied(base):
        assert all(p.requires_grad and p.is_leaf for p in base.parameters())
        base.lm_head.weight.sum().backward()
    assert base.lm_head.weight.grad is not None and loss.requires_grad


def test_a_transformers_model_gives_the_logits_of_the_file(tmp_path):
    from transformers import AutoModelForCausalLM

    base = real_llama(tmp_path / "base", tied=True)
    state = {n: t + 0.02 * torch.randn_like(t) for n, t in load_state(base).items()}
    tuned = save_checkpoint(tmp_path / "tuned", state, tiny_config(tied=True))
    vector = TaskVector.between(base, tuned)
    vector.apply(base, tmp_path / "out", scale=0.5)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with vector.applied(model, 0.5):
            assert torch.allclose(model(ids).logits, written(ids).logits, atol=1e-6)
            assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
        assert model(ids).logits.equal(plain)
