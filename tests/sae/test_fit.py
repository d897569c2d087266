"""Training finds planted directions, folds its scale exactly, wakes dead latents, and says what is wrong."""

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import Planted, measure, recovered
from surgery.sae.rules import BatchTopK, Gated, JumpRelu, Matryoshka, Standard, TopK
from surgery.sae.train import Entry, Fitting, Settings, fit

RULES = [TopK(k=3), TopK(k=3, by_norm=False), BatchTopK(k=3.0), Matryoshka(k=3.0, widths=(8,)), Standard(l1=0.1),
         Gated(l1=0.1), JumpRelu(l0=0.01)]  # fmt: skip


def batches(planted, count, size=256, site="a", times=1.0):
    return [{site: times * planted.rows(size, seed)[0]} for seed in range(count)]


@pytest.mark.parametrize("rule", [TopK(k=2), BatchTopK(k=2.0)], ids=str)
def test_planted_directions_are_found(rule):
    torch.set_num_threads(1)
    planted, test = Planted(d=32, n=48, rate=0.04), Planted(d=32, n=48, rate=0.04).rows(2000, 10_000)[0]
    entry = Entry("a", Dictionary(32, 64, rule), Settings(lr=3e-3, dead_after=20_000))
    before = recovered(planted.directions, entry.dictionary.decoder.detach())
    fit({"one": entry}, batches(planted, 600), steps=600)
    found = recovered(planted.directions, entry.dictionary.decoder.detach())
    assert found["recall"] > 0.8 and before["recall"] == 0 and found["mmcs"] > 0.9 > before["mmcs"]
    assert measure(entry.dictionary, [test]).fvu < 0.3
    assert entry.log[-1]["loss"] < 0.5 * entry.log[0]["loss"]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_scale_is_folded_exactly(rule):
    """Before: of scaled rows, the output unscaled. After: of the rows as they are. The same latents are chosen."""
    planted = Planted(d=16, n=20, rate=0.1, noise=0.05)
    entry = Entry("a", Dictionary(16, 40, rule, seed=2).double(), Settings(lr=1e-2))
    rows = [{"a": r["a"].double()} for r in batches(planted, 30, times=37.0)]
    before = {}

    def on_step(step, lines):
        if step == 30:
            x = rows[0]["a"]
            before["codes"] = entry.dictionary.codes(x * entry.scale[0])
            before["output"] = entry.dictionary(x * entry.scale[0]) / entry.scale[1]
            assert abs(entry.scale[0] - 1) > 0.5

    fit({"one": entry}, rows, steps=30, on_step=on_step)
    codes = entry.dictionary.codes(rows[0]["a"])
    assert torch.equal(codes.layout.index, before["codes"].layout.index) and len(codes.values) > 50
    torch.testing.assert_close(codes.values, before["codes"].values)
    torch.testing.assert_close(entry.dictionary(rows[0]["a"]), before["output"])


def test_transcoders_fold_two_scales():
    planted, mix = Planted(d=12, n=16, rate=0.1), torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    rows = [{"in": r["a"].double(), "out": 100 * r["a"].double() @ mix.double()} for r in batches(planted, 20)]
    entry = Entry("in", Dictionary(12, 30, TopK(k=4), d_out=7, centered=False, skip=True).double(),
                  Settings(lr=1e-2), target="out")  # fmt: skip
    before = {}

    def on_step(step, lines):
        before["output"] = entry.dictionary(rows[0]["in"] * entry.scale[0]) / entry.scale[1]

    fit({"one": entry}, rows, steps=20, on_step=on_step)
    torch.testing.assert_close(entry.dictionary(rows[0]["in"]), before["output"])
    assert entry.log[-1]["fvu"] < 0.5 * entry.log[0]["fvu"]


@pytest.mark.parametrize("rule", [BatchTopK(k=3.0), Matryoshka(k=3.0, widths=(8,))], ids=str)
def test_a_finished_dictionary_has_as_many_codes_as_in_its_last_step(rule):
    """The threshold is the smallest kept value of the last rows: of them exactly k a row are chosen."""
    planted = Planted(d=16, n=20, rate=0.1, noise=0.05)
    rows = batches(planted, 5, times=9.0)
    entry = Entry("a", Dictionary(16, 40, rule, seed=2).double(), Settings(lr=1e-2))
    fit({"one": entry}, [{"a": r["a"].double()} for r in rows], steps=5)
    x = rows[-1]["a"].double()
    assert len(entry.dictionary.codes(x).values) == pytest.approx(3 * len(x), abs=1)


def test_several_dictionaries_over_one_stream_are_as_each_by_itself():
    planted = Planted(d=16, n=20)
    both = [r | {"b": -2 * r["a"]} for r in batches(planted, 20)]
    make = lambda: {"one": Entry("a", Dictionary(16, 32, TopK(k=2))), "two": Entry("b", Dictionary(16, 24, Standard()))}  # noqa: E731
    together = fit(make(), both, steps=20)
    for name, entry in make().items():
        alone = fit({name: entry}, both, steps=20)[name]
        for p, q in zip(alone.dictionary.parameters(), together[name].dictionary.parameters(), strict=True):
            assert torch.equal(p, q)


def test_dead_latents_are_noticed_and_come_back():
    planted = Planted(d=16, n=20, rate=0.1)
    found = {}
    for aux in (0.0, 1.0):
        dictionary = Dictionary(16, 40, TopK(k=2, aux=aux))
        with torch.no_grad():
            dictionary.bias[:20] = -1.0
        entry = Entry("a", dictionary, Settings(lr=1e-2, dead_after=1000))
        fit({"one": entry}, batches(planted, 200), steps=200)
        assert entry.log[0]["dead"] == 0 and entry.log[10]["dead"] >= 0.5
        found[aux] = entry.log[-1]["dead"]
    assert found[1.0] <= found[0.0] - 0.1, found


def test_thresholds_stay_above_zero_and_penalties_warm_up():
    planted = Planted(d=16, n=20, rate=0.1)
    entry = Entry("a", Dictionary(16, 40, JumpRelu(l0=1e-4, threshold=0.001, warmup=10)), Settings(lr=0.05))
    fit({"one": entry}, batches(planted, 40), steps=40)
    assert float(entry.dictionary.threshold.min()) >= 0
    standard = Entry("a", Dictionary(16, 40, Standard(l1=1.0, warmup=10)), Settings(lr=0.0))
    fit({"one": standard}, batches(planted, 1) * 12, steps=12)
    penalties = [line["l1"] for line in standard.log]
    assert penalties[0] == pytest.approx(penalties[-1] / 10) and penalties[9] == pytest.approx(penalties[11])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "ended after 0 of 5 steps"),
        ([{"a": torch.eye(4, 8)}] * 3, "ended after 3 of 5"),
        ([{"a": torch.ones(4, 8)}] * 5, "'a' that 'one' reads are the same in every row"),
        ([{"b": torch.eye(4, 8)}] * 5, "reads 'a', and the activations are of b"),
        ([{"a": torch.zeros(4, 8)}] * 5, "are all 0"),
        ([{"a": torch.eye(4, 9)}] * 5, "8 numbers, found 9"),
        ([{"a": torch.ones(4, 8) * float("nan")}] * 5, "all 0, or not finite"),
        (
            [*[{"a": torch.eye(4, 8)}] * 30, {"a": torch.full((4, 8), torch.inf)}],
            "Step 31 of 'one': .*row 0 of the batch",
        ),
    ],
    ids=range(8),
)
def test_what_is_wrong_is_told(rows, told):
    steps = 5 if len(rows) < 10 else 31
    with pytest.raises(SurgeryError, match=told):
        fit({"one": Entry("a", Dictionary(8, 16, TopK(k=2)))}, rows, steps=steps)


def test_rows_come_to_where_the_dictionary_is():
    """As from a cache or a checkpoint: of another type here, on another device elsewhere."""
    planted, entry = Planted(d=16, n=20), Entry("a", Dictionary(16, 40, BatchTopK(k=3.0)).double())
    fit({"one": entry}, batches(planted, 3), steps=3)
    assert len(entry.log) == 3 and float(entry.dictionary.threshold) > 0


@pytest.mark.filterwarnings("ignore:for .* no-op")
def test_all_that_the_optimizer_keeps_is_where_its_parameters_are():
    """Fused steps on a device read their count there; "meta" stands for any."""
    one = Fitting({"one": Entry("a", Dictionary(16, 40, TopK(k=3)))}, 1)
    one.run(batches(Planted(d=16, n=20), 1))
    tensors, numbers = one.state()
    other = Fitting({"one": Entry("a", Dictionary(16, 40, TopK(k=3)).to("meta"))}, 1)
    other.restore(tensors, numbers)
    state = other.optimizers["one"].state
    assert {v.device.type for kept in state.values() for v in kept.values()} == {"meta"} and len(state) == 4


def test_what_is_rebuilt_elsewhere_is_not_centred_by_its_bias():
    """The two are scaled apart, and one bias can't take in both scales."""
    rows = [{"in": r["a"], "out": 9 * r["a"]} for r in batches(Planted(d=16, n=20), 2)]
    with pytest.raises(SurgeryError, match="'one' rebuilds 'out', and is centred"):
        fit({"one": Entry("in", Dictionary(16, 40, TopK(k=3)), target="out")}, rows, steps=2)
