"""Path patching against the plain form: one sender at a time, three whole forwards each, on every family."""

import pytest
import torch
from activations.families import FAMILIES, build, prompts
from torch.utils.flop_counter import FlopCounterMode

from analysis.metrics import log_prob, logit_diff
from analysis.paths import path_patch
from analysis.positions import columns_of, earlier
from surgery.activations import run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, encode

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
METRIC = logit_diff(ANSWERS)


def path_patch_plain(model, base, source, metric, receivers, position, heard=None, read_at=None, through_mlps=True):
    """(example, layer, head) by the definition; positions are columns (batch,) or None for all."""
    anatomy, rows = anatomy_of(model), torch.arange(len(base))
    heard = position if heard is None else heard
    logits, own = run(model, base, ["z", "mlp_out"])
    _, other = run(model, source, ["z"])
    before = metric.of_logits(logits, base.last)
    found = torch.zeros(len(base), anatomy.n_layers, anatomy.n_heads)
    for layer in range(anatomy.n_layers):
        for head in range(anatomy.n_heads):
            z = own[f"z.{layer}"].clone()
            if position is None:
                z[:, :, head] = torch.where(base.mask[..., None], other[f"z.{layer}"][:, :, head], z[:, :, head])
            else:
                z[rows, position, head] = other[f"z.{layer}"][rows, heard, head]
            edits = {f"z.{at}": z if at == layer else own[f"z.{at}"] for at in range(anatomy.n_layers)}
            if not through_mlps:  # as copies: some families add to them in place
                edits |= {
                    f"mlp_out.{at}": lambda _, at=at: own[f"mlp_out.{at}"].clone() for at in range(anatomy.n_layers)
                }
            patched, read = run(model, base, receivers, edits=edits)
            if receivers:
                patched, _ = run(model, base, edits={site: writer(read[site], read_at) for site in receivers})
            found[:, layer, head] = metric.of_logits(patched, base.last) - before
    return found.numpy()


def writer(value, at):
    def write(old):
        if at is None:
            return value
        old, rows = old.clone(), torch.arange(len(old))
        old[rows, at] = value[rows, at]
        return old

    return write


def close(found, expected, least=1e-4):
    """Within 1e-5, and something is there to be compared."""
    assert abs(expected).max() > least
    assert abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_plain_form(name):
    model = build(name)
    last_kv = anatomy_of(model).n_kv_heads - 1
    base, source = Batch.of(CLEAN), Batch.of(CORRUPT)
    several = ["q.2.1", "q.1.3", "k.2.0", f"v.1.{last_kv}"]
    last, third = base.last, torch.full((4,), 3)
    for receivers, position, through_mlps in (
        ([], -1, True),
        ([], -1, False),
        (["q.2.1", "q.1.3"], -1, True),
        (several, 3, True),
        (several, None, False),
    ):
        columns = {-1: last, 3: third, None: None}[position]
        found = path_patch(model, CLEAN, CORRUPT, METRIC, receivers=receivers or "logits", position=position,
                           through_mlps=through_mlps)  # fmt: skip
        close(found.values, path_patch_plain(model, base, source, METRIC, receivers, columns,
                                             through_mlps=through_mlps))  # fmt: skip
        assert not found.values[:, 2, :].any() or not receivers


@pytest.mark.parametrize("name", ["llama_gqa", "bloom", "gptj"])
def test_positions_of_each_example_and_of_the_other_run(name):
    model = build(name)
    base, source = Batch.of(CLEAN), Batch.of(CORRUPT)
    columns, heard = torch.tensor([3, 5, 8, 2]), torch.tensor([4, 5, 7, 0])
    expected = path_patch_plain(model, base, source, METRIC, ["v.1.0", "q.2.1"], columns, heard, read_at=columns)
    found = path_patch(model, CLEAN, CORRUPT, METRIC, receivers=["v.1.0", "q.2.1"], position=columns - 9,
                       source_position=lambda batch: heard, receiver_position=columns.tolist())  # fmt: skip
    close(found.values, expected)
    # Three of the four send from elsewhere than the logits are read at: nothing arrives.
    found = path_patch(model, CLEAN, CORRUPT, METRIC, position=columns)
    close(found.values, path_patch_plain(model, base, source, METRIC, [], columns))
    assert not found.values[[0, 1, 3]].any()


def test_receivers_hold_what_they_read_at_other_tokens():
    """An early receiver changes later tokens; a later one reads them as recorded, unless it is told where to read."""
    model, receivers = build("llama"), ["k.1.0", "k.2.0"]
    base, source, third = Batch.of(CLEAN), Batch.of(CORRUPT), torch.full((4,), 3)
    held = path_patch(model, CLEAN, CORRUPT, METRIC, receivers=receivers, position=3)
    free = path_patch(model, CLEAN, CORRUPT, METRIC, receivers=receivers, position=3, receiver_position=3)
    close(held.values, path_patch_plain(model, base, source, METRIC, receivers, third))
    close(free.values, path_patch_plain(model, base, source, METRIC, receivers, third, read_at=third))
    assert abs(held.values - free.values).max() > 1e-3


@pytest.mark.parametrize("receivers", ["logits", ["q.1", "v.2.1"]])
def test_metrics_that_need_all_logits(receivers):
    model = build("qwen3")
    base, source = Batch.of(CLEAN), Batch.of(CORRUPT)

    def spread(logits):
        return logits.std(-1).mean(-1)

    class Spread:
        of_logits = staticmethod(lambda logits, last: spread(logits))

    sites = [] if receivers == "logits" else receivers
    for position in (5, None):
        columns = None if position is None else torch.full((4,), position)
        whole = [f"q.1.{head}" for head in range(4)] + ["v.2.1"] if sites else []
        found = path_patch(model, CLEAN, CORRUPT, spread, receivers=receivers, position=position)
        close(found.values, path_patch_plain(model, base, source, Spread, whole, columns))


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "falcon_alibi"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(name, side):
    model = build(name)
    lengths = [9, 6, 7, 5]
    clean = [row[:n] for row, n in zip(CLEAN.tolist(), lengths, strict=True)]
    corrupt = [row[:n] for row, n in zip(CORRUPT.tolist(), lengths, strict=True)]
    pads = [encode(None, rows, side=side) for rows in (clean, corrupt)]
    for more in ({}, {"receivers": ["q.1.2", "v.2.0"], "position": None}, {"receivers": ["q.2"], "position": -2}):
        found = path_patch(model, *pads, METRIC, **more)
        for i in range(4):
            alone = path_patch(model, [clean[i]], [corrupt[i]], METRIC.select(slice(i, i + 1)), **more)
            assert abs(found.values[i] - alone.values[0]).max() < 1e-5
        assert abs(found.values).max() > 1e-3 or more.get("position") == -2


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_form(name):
    """Logits here are of order 4: 0.03 is one bit. Effects may lie two bits apart."""
    half, base, source = build(name, dtype=torch.bfloat16), Batch.of(CLEAN), Batch.of(CORRUPT)
    exact = path_patch(build(name), CLEAN, CORRUPT, METRIC).values
    found = path_patch(half, CLEAN, CORRUPT, METRIC).values
    expected = path_patch_plain(half, base, source, METRIC, [], base.last)
    assert abs(found - expected).max() < 0.06 and abs(found - exact).max() < 0.06 < abs(exact).max()


def test_prompts_of_different_length_are_counted_from_the_end():
    model = build("llama_gqa")
    longer = torch.cat([CORRUPT[:, :2], CORRUPT], 1)
    found = path_patch(model, CLEAN, longer, METRIC)
    base, source = Batch.of(CLEAN), Batch.of(longer)
    close(found.values, path_patch_plain(model, base, source, METRIC, [], base.last, source.last))


def test_directions_columns_and_senders():
    model = build("gpt2")
    noising = path_patch(model, CLEAN, CORRUPT, METRIC)
    denoising = path_patch(model, CORRUPT, CLEAN, METRIC, direction="denoising")
    assert (noising.values == denoising.values).all() and noising.columns["clean"] == denoising.columns["corrupt"]
    clean, corrupt = (METRIC.of_logits(model(ids).logits.detach(), Batch.of(ids).last) for ids in (CLEAN, CORRUPT))
    assert torch.tensor(noising.columns["clean"]).sub(clean).abs().max() < 1e-5
    assert torch.tensor(noising.columns["span"]).sub(clean - corrupt).abs().max() < 1e-5
    some = path_patch(model, CLEAN, CORRUPT, METRIC, senders=["z.2.3", "blocks.0.attn.hook_z"])
    assert list(some.axes["sender"]) == ["z.2.3", "z.0.0", "z.0.1", "z.0.2", "z.0.3"]
    assert abs(some.values[:, 0] - noising.values[:, 2, 3]).max() < 1e-6
    assert abs(some.values[:, 1:] - noising.values[:, 0]).max() < 1e-6
    assert noising.normalized().mean.shape == (3, 4)


def test_a_small_budget_and_small_portions_give_the_same_numbers(monkeypatch):
    model, told = build("llama_gqa"), []
    more = {"receivers": ["q.2", "k.1.0"], "position": None}
    whole = path_patch(model, CLEAN, CORRUPT, METRIC, **more)
    small = path_patch(model, CLEAN, CORRUPT, METRIC, **more, budget=30_000, progress=lambda *a: told.append(a))
    assert abs(whole.values - small.values).max() < 1e-5
    assert len(told) > 8 and told[-1] == (32, 32) and told == sorted(told)
    monkeypatch.setattr("surgery.activations.resume.TOKENS", 80)  # two senders at a time
    portions = path_patch(model, CLEAN, CORRUPT, METRIC, **more)
    assert abs(whole.values - portions.values).max() < 1e-5


@pytest.mark.parametrize("more", [{}, {"receivers": ["q.2"]}, {"receivers": ["v.1"], "position": None}])
def test_the_cost_is_what_is_computed(more):
    """Against operations as PyTorch counts them; scores and patterns, which are not counted, are small here."""
    model = build("llama_gqa")
    anatomy_of(model)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        model(CLEAN)
    with FlopCounterMode(display=False) as all_of_it:
        found = path_patch(model, CLEAN, CORRUPT, log_prob(ANSWERS[:, 0]), **more)
    told = found.meta["cost"]
    assert told["forwards"] == pytest.approx(all_of_it.get_total_flops() / one.get_total_flops(), rel=0.2)
    assert told["loop"] == {"logits": 14, "q.2": 18, "v.1": 10}[more.get("receivers", ["logits"])[0]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"receivers": ["q.0.1"]}, "No sender comes before"),
        ({"receivers": ["q.1.1"], "senders": ["z.1.0"]}, "No sender comes before"),
        ({"receivers": ["q.2.4"]}, "there is no head 4"),
        ({"receivers": ["k.2.2"]}, "there is no key-value head 2"),
        ({"receivers": ["q.3"]}, "there is no layer 3"),
        ({"receivers": ["mlp_in.2"]}, "is no receiver"),
        ({"receivers": []}, "no receivers"),
        ({"receivers": ["q.2.1@-1"]}, "names a position"),
        ({"senders": ["z.0.9"]}, "there is no head 9"),
        ({"senders": "resid_pre"}, "is no sender"),
        ({"position": -3}, "Nothing that is sent can arrive"),
        ({"position": -3, "receivers": ["q.2"], "receiver_position": -1}, "Nothing that is sent can arrive"),
        ({"position": 9, "receivers": ["q.2"]}, "position of prompt 0 is 9"),
        ({"position": [1, 2], "receivers": ["q.2"]}, "one for each of the 4 prompts"),
        ({"position": 0.5, "receivers": ["q.2"]}, "one whole number"),
        ({"receiver_position": -1}, "belongs to heads"),
        ({"position": None, "source_position": 3, "receivers": ["q.2"]}, "source_position"),
        ({"direction": "up"}, "direction"),
    ],
)
def test_what_is_wrong_is_said(more, message):
    with pytest.raises(SurgeryError, match=message):
        path_patch(build("llama_gqa"), CLEAN, CORRUPT, METRIC, **more)


def test_prompts_that_do_not_fit_are_named():
    model = build("llama_gqa")
    with pytest.raises(SurgeryError, match="4 clean prompts and 3"):
        path_patch(model, CLEAN, CORRUPT[:3], METRIC)
    with pytest.raises(SurgeryError, match="made for 4 examples"):
        path_patch(model, CLEAN[:3], CORRUPT[:3], METRIC)
    for position in (None, 3, torch.tensor([3, 3, 3, 3])):
        with pytest.raises(SurgeryError, match="are 9 and 8 tokens long"):
            path_patch(model, CLEAN, CORRUPT[:, :8], METRIC, receivers=["q.2"], position=position)


def test_a_model_is_untouched_also_after_an_exception():
    model = build("llama_gqa").train()
    model.config.use_cache = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def broken(logits):
        calls.append(logits)
        if len(calls) == 3:  # in the middle of the last pass
            raise KeyError("broken")
        return logits[:, -1, 0]

    for more in ({}, {"receivers": ["q.2", "v.1"]}):
        calls: list = []
        with pytest.raises(KeyError, match="broken"):
            path_patch(model, CLEAN, CORRUPT, broken, **more)
        assert model.training and not model.config.use_cache
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_places_in_prompts():
    batch = encode(None, [[5, 7, 5, 9, 5, 8], [4, 9, 9, 9]])
    assert columns_of(earlier(-2), batch).tolist() == [0, 1]
    assert columns_of([-1, 0], batch).tolist() == [5, 0]
    with pytest.raises(SurgeryError, match="token at -1 of prompt 0 .id 8. does not occur"):
        columns_of(earlier(-1), batch)
    with pytest.raises(SurgeryError, match="position of prompt 1 is 4, and it has 4 tokens"):
        columns_of(4, batch)


@pytest.mark.peers
@pytest.mark.parametrize(("name", "component"), [("gpt2", "q"), ("gpt2", "k"), ("gpt2", "v"), ("llama_gqa", "q")])
def test_the_edge_alone_is_that_of_transformer_lens(name, component):
    pytest.importorskip("transformer_lens")
    from transformer_lens.patching import get_act_patch_direct_path

    from surgery.interop import to_transformer_lens

    model = build(name, attn="eager")
    bridge = to_transformer_lens(model)
    rows = torch.arange(4)

    def mean_difference(logits):
        return (logits[rows, -1, ANSWERS[:, 0]] - logits[rows, -1, ANSWERS[:, 1]]).mean()

    with torch.no_grad():
        logits, corrupt_cache = bridge.run_with_cache(CORRUPT)
        _, clean_cache = bridge.run_with_cache(CLEAN)
        theirs = get_act_patch_direct_path(bridge, CORRUPT, clean_cache, corrupt_cache, mean_difference, 0, 1,
                                           component, verbose=False) - mean_difference(logits)  # fmt: skip
    for layer, head in ((1, 0), (1, 3), (2, 2)):
        ours = path_patch(model, CLEAN, CORRUPT, METRIC, senders=["z.0.1"], receivers=[f"{component}.{layer}.{head}"],
                          position=None, through_mlps=False, direction="denoising")  # fmt: skip
        assert abs(theirs[layer, head]) > 4e-5
        assert ours.mean[0] == pytest.approx(float(theirs[layer, head]), abs=3e-6)
