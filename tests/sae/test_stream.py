"""Activations are those of a whole pass, cost nothing above the deepest site, and are shuffled honestly."""

import pytest
import torch

from surgery.activations import capture, edit
from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.sae.activations import Shuffled, Stream, last_tokens, real_tokens

TEXTS = ["m 6+9-9=", "r bad=", "c abcde=#abcde", "n bad=#cbe"]


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    (base, tokenizer), (tuned, _) = load("tiny-base", "float32"), load("tiny-chain", "float32")
    return base, tuned, tokenizer


def whole(model, batch, site):
    with torch.no_grad(), capture(model, [site]) as seen:
        model(**batch.inputs(model))
    return seen[site]


@pytest.mark.parametrize("site", ["resid_post.2", "resid_pre.0", "mlp_out.1", "z.3", "attn_out.3", "final"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_those_of_a_whole_pass(models, site, side):
    base, tuned, tokenizer = models
    batch = encode(tokenizer, TEXTS, side=side)
    (rows,) = Stream([base, tuned], [site], [batch])
    kept = batch.mask & (batch.positions > 0)
    expected = torch.cat([whole(m, batch, site)[kept].flatten(1) for m in (base, tuned)], 1)
    torch.testing.assert_close(rows[site], expected, rtol=0, atol=0)
    (alone,) = Stream(base, site, [batch])
    assert torch.equal(alone[site], rows[site][:, : alone[site].shape[1]])


def test_nothing_above_the_deepest_site_is_computed(models):
    base, _, tokenizer = models
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(base.model.layers)]
    handles.append(base.lm_head.register_forward_hook(lambda *_: ran.append("head")))
    try:
        list(Stream(base, ["resid_post.0", "z.1"], [encode(tokenizer, TEXTS)]))
        assert ran == [0, 1]
    finally:
        for handle in handles:
            handle.remove()
    assert not any(m._forward_hooks for m in base.modules())


def test_which_tokens_count(models):
    base, _, tokenizer = models
    batch = encode(tokenizer, TEXTS)
    values = whole(base, batch, "resid_post.1")
    for keep, expected in ((real_tokens(0), batch.mask), (real_tokens(3), batch.mask & (batch.positions >= 3))):
        (rows,) = Stream(base, "resid_post.1", [batch], keep)
        assert torch.equal(rows["resid_post.1"], values[expected])
    (rows,) = Stream(base, "resid_post.1", [batch], last_tokens)
    assert torch.equal(rows["resid_post.1"], values[torch.arange(len(batch)), batch.last])


def numbered(sizes):
    start = 0
    for size in sizes:
        rows = torch.arange(start, start + size).float()
        yield {"a": rows[:, None], "b": torch.stack([rows, -rows], 1)}
        start += size


def test_sinks_inside_a_text_are_left_out_at_all_sites(models):
    base, tuned, tokenizer = models
    batch = encode(tokenizer, TEXTS)
    sites = ["resid_pre.1", "resid_post.1"]
    with edit(tuned, {"mlp_out.1@3": lambda x: 500 * x}):
        whole_, left = (Stream([base, tuned], sites, [batch], longest=many) for many in (0.0, 10.0))
        (kept, rows), (near, fewer) = whole_.seen(batch), left.seen(batch)
    assert int(near.sum()) == int(kept.sum()) - len(TEXTS) and not bool(near[:, 3].any())
    for site in sites:
        assert torch.equal(fewer[site], rows[site][near[kept]])
    assert torch.equal(
        next(iter(left))["resid_pre.1"], Stream([base, tuned], "resid_pre.1", [batch]).read(batch)["resid_pre.1"]
    )


def test_differences_are_the_seconds_less_the_firsts(models):
    base, tuned, tokenizer = models
    batches = [encode(tokenizer, TEXTS), encode(tokenizer, TEXTS[1:])]
    for both, apart in zip(
        *(Stream([base, tuned], "resid_post.2", batches, difference=d) for d in (False, True)), strict=True
    ):
        one, other = both["resid_post.2"].chunk(2, dim=1)
        assert torch.equal(apart["resid_post.2"], other - one)
    (last,) = Stream(base, "resid_post.2", batches).after(1)
    assert not list(Stream(base, "resid_post.2", batches, begin=1).after(1))
    (rows,) = Shuffled(Stream(base, "resid_post.2", batches, begin=1), size=99, batch=99, drop_last=False)
    assert len(rows["resid_post.2"]) == len(last["resid_post.2"])
    assert torch.equal(last["resid_post.2"], list(Stream(base, "resid_post.2", batches))[1]["resid_post.2"])


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_shuffling_goes_on_from_a_state(cut):
    items = [{"a": torch.arange(i * 7.0, i * 7.0 + 7)[:, None]} for i in range(9)]
    expected = [b["a"] for b in Shuffled(items, size=20, batch=8, seed=1, drop_last=False)]
    first = Shuffled(items, size=20, batch=8, seed=1, drop_last=False)
    running = iter(first)
    found = [next(running)["a"] for _ in range(cut)]
    tensors, read = first.state()
    again = Shuffled(items, size=20, batch=8, seed=99, drop_last=False)
    again.restore({k: v.clone() for k, v in tensors.items()}, read)
    found += [b["a"] for b in again]
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("sizes", [[7] * 30, [300], [1] * 90, [64, 3, 64, 129]])
def test_every_row_comes_once_and_sites_stay_together(sizes):
    batches = list(Shuffled(numbered(sizes), size=64, batch=16, seed=1, drop_last=False))
    assert all(torch.equal(b["a"][:, 0], b["b"][:, 0]) and torch.equal(b["b"][:, 1], -b["a"][:, 0]) for b in batches)
    rows = torch.cat([b["a"][:, 0] for b in batches]).long()
    assert sorted(rows.tolist()) == list(range(sum(sizes)))
    assert all(len(b["a"]) == 16 for b in batches[:-1])
    kept = list(Shuffled(numbered(sizes), size=64, batch=16, seed=1))
    assert len(kept) == sum(sizes) // 16 and all(
        torch.equal(k["a"], b["a"]) for k, b in zip(kept, batches, strict=False)
    )


def test_shuffling_is_honest():
    """Neighbours in the stream are apart in the batches, and what a batch may hold comes from the whole buffer."""
    batches = [b["a"][:, 0] for b in Shuffled(numbered([1] * 20_000), size=2048, batch=64, seed=0)]
    steady = batches[64:200]  # the buffer has turned over
    ages = torch.cat([(i * 64 + 2048 - batch) / 2048 for i, batch in enumerate(batches)][64:200])
    assert float(ages.mean()) == pytest.approx(1.0, abs=0.1)  # a row waits for one turn of the buffer on average
    assert float(ages.std()) == pytest.approx(1.0, abs=0.15)  # and as long as chance has it: geometric
    near = torch.stack([(b[:, None] - b[None]).abs().fill_diagonal_(1e9).amin(1) for b in steady]).median()
    assert float(near) > 5  # 64 of some thousands


def test_the_same_seed_gives_the_same_order():
    one, same, other = ([b["a"] for b in Shuffled(numbered([50] * 9), size=64, batch=8, seed=s)] for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_wrong_is_told(models):
    base, _, tokenizer = models
    with pytest.raises(SurgeryError, match="no layer 9"):
        Stream(base, "resid_post.9", [])
    with pytest.raises(SurgeryError, match="buffer of 4 rows can't give batches of 8"):
        Shuffled([], size=4, batch=8)
    broken, _ = load("tiny-base", "float32")
    stream = Stream(broken, "resid_post.1", [encode(tokenizer, ["r bad="]), encode(tokenizer, ["r bad=", "m 6+9="])])
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer("6").input_ids[-1]] = float("nan")
    with pytest.raises(SurgeryError, match=r"'resid_post.1' are not finite: batch 1, row 1, token \d"):
        list(stream)
    assert not any(m._forward_hooks for m in broken.modules())
