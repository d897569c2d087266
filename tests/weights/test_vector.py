"""TaskVector: the algebra, laziness, bases that do not fit, and the way to disk and back."""

import json

import pytest
import torch
from helpers import load_state, read_json, same_bits, save_checkpoint, tiny_checkpoint, tiny_config, tiny_family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.weights import sources, sparsify
from surgery.weights.vector import TaskVector


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return tiny_family(tmp_path_factory.mktemp("family"), 3)


@pytest.fixture(scope="module")
def vectors(family):
    base, tuned = family
    return [TaskVector.between(base, t) for t in tuned]


def delta(family, i, name):
    base, tuned = family
    return load_state(tuned[i])[name] - load_state(base)[name]


NAME = "model.layers.1.mlp.down_proj.weight"


def test_reads_the_difference_in_rows(family, vectors):
    whole = delta(family, 0, NAME)
    assert vectors[0].tensor(NAME).equal(whole)
    assert vectors[0].read(NAME, 3, 7).equal(whole[3:7])
    assert vectors[0].read(NAME, 3, 7).dtype == torch.float32
    assert vectors[0].norm(NAME) == pytest.approx(float(whole.norm()), rel=1e-6)


def test_what_is_read_is_the_readers_own(family, vectors):
    before = load_state(family[1][0])
    vectors[0].tensor(NAME).fill_(9)
    assert vectors[0].tensor(NAME).equal(delta(family, 0, NAME))
    assert same_bits(before, load_state(family[1][0]))


def test_nothing_is_read_before_it_is_asked_for(family, monkeypatch):
    base, tuned = family

    def refuse(*_):
        raise AssertionError("read too early")

    monkeypatch.setattr("surgery.checkpoint.reader.Checkpoint.read", refuse)
    a, b = (TaskVector.between(base, t) for t in tuned[:2])
    vector = (0.5 * (a + b) - 3 * a).only("mlp").scaled(gradient=[0, 1]).low_rank(2).sparsified(0.5)
    assert "tuned0 - base" in repr(vector)
    with pytest.raises(AssertionError, match="too early"):
        vector.tensor(NAME)


def test_algebra_is_that_of_the_numbers(family, vectors):
    a, b, c = vectors
    x, y, z = (delta(family, i, NAME).double() for i in range(3))
    for vector, expected in [
        (a + b, x + y), (a - b, x - y), (2.5 * a, 2.5 * x), (a * 2, 2 * x), (a / 4, x / 4), (-a, -x),
        (sum([a, b, c]), x + y + z), (TaskVector.analogy(a, b, c), z + (y - x)), (0.5 * (a + 2 * b) - c, x / 2 + y - z),
    ]:  # fmt: skip
        torch.testing.assert_close(vector.tensor(NAME).double(), expected, rtol=0, atol=1e-8)


def test_equal_terms_meet(vectors):
    a, b, _ = vectors
    assert (a + b) - b == a
    negative = -a
    assert -negative == a
    assert a + a == 2 * a
    assert a + b != b - a
    assert str(a + b) == "(tuned0 - base) + (tuned1 - base)"
    assert str(0.5 * a - 2 * b) == "0.5*(tuned0 - base) - 2*(tuned1 - base)"
    assert (a - a).tensor(NAME).count_nonzero() == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(-3, 3, allow_nan=False)), min_size=1, max_size=5),
    st.integers(0, 16), st.integers(0, 16),
)  # fmt: skip
def test_any_combination_in_any_rows(family, vectors, terms, low, high):
    vector = sum(factor * vectors[i] for i, factor in terms)
    expected = sum(factor * delta(family, i, NAME).double() for i, factor in terms)
    start, stop = sorted((low, high))
    torch.testing.assert_close(vector.read(NAME, start, stop).double(), expected[start:stop], rtol=0, atol=1e-6)


def test_scaling_by_layer_module_and_gradient(family, vectors):
    a = vectors[0]
    first, embedding = NAME.replace("layers.1", "layers.0"), "model.embed_tokens.weight"
    x, y, e = (delta(family, 0, n) for n in (NAME, first, embedding))
    by_layer = a.scaled(per_layer={1: 3.0})
    assert by_layer.tensor(NAME).equal(3 * x) and by_layer.tensor(first).equal(y)
    assert a.scaled(per_layer=[0.0, 2.0]).tensor(NAME).equal(2 * x)
    assert a.scaled(per_layer=lambda i: i + 1.0).tensor(NAME).equal(2 * x)
    modules = a.scaled(per_module={"mlp": 2.0, "down_proj": 7.0, "*": 0.0})
    assert modules.tensor(NAME).equal(2 * x) and modules.tensor(embedding).count_nonzero() == 0
    gradient = a.scaled(gradient=[0.5, 1.0, 4.0])
    assert gradient.tensor(NAME).equal(4 * x)
    assert gradient.tensor(first).equal(0.5 * y) and gradient.tensor(embedding).equal(0.5 * e)
    with pytest.raises(SurgeryError, match="2 layers"):
        a.scaled(per_layer=[1.0])
    with pytest.raises(SurgeryError, match="mpl"):
        a.scaled(per_module={"mpl": 2.0})


def test_filters(vectors):
    a = vectors[0]
    assert all("mlp" in n for n in a.only("mlp").names)
    assert set(a.only("mlp").names) | set(a.without("mlp").names) == set(a.names)
    assert set(a.only(r"layers\.1\..*(up|down)_").names) == {NAME, NAME.replace("down", "up")}
    both = a.only("mlp") + a.without("mlp")
    assert both.tensor(NAME).equal(a.tensor(NAME)) and set(both.names) == set(a.names)
    with pytest.raises(SurgeryError, match="No tensor fits"):
        a.only("atention")
    with pytest.raises(SurgeryError, match="regular expression"):
        a.only("(")


def test_mismatches_are_told(tmp_path, family, vectors):
    base, tuned = family
    other = tiny_checkpoint(tmp_path / "other", seed=9)
    wide = tiny_checkpoint(tmp_path / "wide", vocab=48)
    with pytest.raises(SurgeryError, match=r"\[40, 16\].*\[48, 16\]"):
        TaskVector.between(base, wide)
    with pytest.raises(SurgeryError, match="the same"):
        TaskVector.between(base, base)
    with pytest.raises(SurgeryError, match="other shapes|is \\[40, 16\\]"):
        vectors[0] + TaskVector.between(wide, tiny_checkpoint(tmp_path / "w2", near=wide, vocab=48))
    with pytest.raises(SurgeryError, match="no tensor 'nothing'"):
        vectors[0].tensor("nothing")
    mixed = vectors[0] + TaskVector.between(other, tuned[1])  # told when the numbers are there
    with pytest.raises(SurgeryError, match="bases"):
        mixed.save(tmp_path / "mixed.safetensors")
    free = vectors[0].unbound() + TaskVector.between(other, tuned[1]).unbound()
    free.save(tmp_path / "free.safetensors")
    state = load_state(base)
    extra = save_checkpoint(tmp_path / "extra", state | {"odd": torch.ones(3)}, tiny_config())
    with pytest.raises(SurgeryError, match="'odd'"):
        TaskVector.between(base, extra)
    assert "odd" not in TaskVector.between(base, extra, missing="skip")


def test_integers_must_agree_and_are_left_out(tmp_path):
    state = {"w": torch.randn(4, 4), "steps": torch.arange(3)}
    base = save_checkpoint(tmp_path / "base", state, {})
    same = save_checkpoint(tmp_path / "same", state | {"w": torch.randn(4, 4)}, {})
    other = save_checkpoint(tmp_path / "other", state | {"steps": torch.arange(1, 4)}, {})
    assert TaskVector.between(base, same).names == ["w"]
    with pytest.raises(SurgeryError, match="integer tensor 'steps'"):
        TaskVector.between(base, other)
    TaskVector.between(base, same).apply(base, tmp_path / "out", scale=0.5)
    assert load_state(tmp_path / "out")["steps"].equal(torch.arange(3))


def test_nan_is_not_passed_on(tmp_path, family):
    state = load_state(family[1][0])
    state[NAME][2, 3] = float("nan")
    bad = save_checkpoint(tmp_path / "bad", state, tiny_config())
    for form in ("float32", "lossless"):
        with pytest.raises(SurgeryError, match="NaN"):
            TaskVector.between(family[0], bad).save(tmp_path / f"{form}.safetensors", form)
        assert not (tmp_path / f"{form}.safetensors").exists()
    for scale in (1.0, 0.5):
        with pytest.raises(SurgeryError, match=f"tensor '{NAME}' has values that are NaN"):
            TaskVector.between(family[0], bad).apply(family[0], tmp_path / "out", scale=scale)
        assert not (tmp_path / "out").exists()


def test_applied_to_disk(tmp_path, family, vectors):
    base, _ = family
    done = (0.5 * vectors[0] + vectors[1]).apply(base, tmp_path / "out", scale=0.5)
    out = load_state(tmp_path / "out")
    for name, b in load_state(base).items():
        expected = b.double() + 0.25 * delta(family, 0, name).double() + 0.5 * delta(family, 1, name).double()
        torch.testing.assert_close(out[name].double(), expected, rtol=0, atol=1e-6)
    assert {r.action for r in done.tensors.values()} == {"changed"}
    record = read_json(tmp_path / "out" / "surgery.json")
    assert record["operation"] == "apply" and set(record["tensors"]) == set(out)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(SurgeryError, match="exists already"):
        vectors[0].apply(base, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", [None, "lossless"])
def test_put_back_on_its_base_it_is_the_tuned_model(tmp_path, dtype, form):
    base, (tuned,) = tiny_family(tmp_path, 1, dtype=dtype, sharded=True)
    vector = TaskVector.between(base, tuned)
    if form is not None:
        vector.save(tmp_path / "v.safetensors", form)
        vector = TaskVector.load(tmp_path / "v.safetensors")
    done = vector.apply(base, tmp_path / "out", shard_size="10KB", threads=2)
    assert same_bits(load_state(tmp_path / "out"), load_state(tuned))
    assert {r.action for r in done.tensors.values()} == {"restored"} and done.rounding_loss == 0


def test_untouched_tensors_keep_their_bits(tmp_path, family, vectors):
    done = vectors[0].only("layers.1.").apply(family[0], tmp_path / "out", scale=2)
    out, base = load_state(tmp_path / "out"), load_state(family[0])
    assert {n for n, r in done.tensors.items() if r.action == "changed"} == {n for n in base if "layers.1." in n}
    assert all(out[n].equal(base[n]) for n in base if "layers.1." not in n)


def test_another_base_is_refused(tmp_path, family, vectors):
    base, tuned = family
    for vector in (vectors[0], _stored(vectors[0], tmp_path)):
        with pytest.raises(SurgeryError, match="not the base"):
            vector.apply(tuned[1], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    vectors[0].apply(tuned[1], tmp_path / "out", transfer=True)
    expected = load_state(tuned[1])[NAME] + delta(family, 0, NAME)
    torch.testing.assert_close(load_state(tmp_path / "out")[NAME], expected, rtol=0, atol=1e-6)
    stranger = tiny_checkpoint(tmp_path / "stranger", seed=77)
    with pytest.raises(SurgeryError, match="do not stem from one"):
        vectors[0].apply(stranger, tmp_path / "far", transfer=True)
    done = vectors[0].apply(stranger, tmp_path / "far", transfer="anyway")
    assert "do not stem" in done.warnings[0]
    wide = tiny_checkpoint(tmp_path / "wide", vocab=48)
    with pytest.raises(SurgeryError, match="does not fit"):
        vectors[0].apply(wide, tmp_path / "wide_out", transfer=True)


def test_a_copy_of_the_base_is_the_base(tmp_path, family, vectors):
    copy = save_checkpoint(tmp_path / "copy", load_state(family[0]), tiny_config(), sharded=True)
    vectors[0].apply(copy, tmp_path / "out")
    assert same_bits(load_state(tmp_path / "out"), load_state(family[1][0]))


def _stored(vector, folder):
    vector.save(folder / "stored.safetensors")
    return TaskVector.load(folder / "stored.safetensors")


def test_a_head_of_its_own_on_a_tied_base(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", tied=True)
    state = load_state(base)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 0.01
    untied = save_checkpoint(tmp_path / "untied", state, tiny_config(tied=False))
    vector = TaskVector.between(base, untied)
    torch.testing.assert_close(vector.tensor("lm_head.weight"), torch.full((40, 16), 0.01), rtol=0, atol=1e-7)
    done = vector.apply(base, tmp_path / "out")
    assert same_bits(load_state(tmp_path / "out"), state)
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    assert "no longer ties" in done.warnings[0]


def test_a_head_in_the_file_of_a_tied_model_is_not_used(tmp_path):
    base, (tuned,) = tiny_family(tmp_path, 1, tied=True)
    state = load_state(tuned)
    more = state | {"lm_head.weight": torch.ones(40, 16)}
    ignored = save_checkpoint(tmp_path / "ignored", more, tiny_config(tied=True))
    vector = TaskVector.between(base, ignored)
    assert "lm_head.weight" not in vector
    vector.apply(base, tmp_path / "out")
    assert same_bits(load_state(tmp_path / "out"), state)


def test_rounding_is_reported_and_can_be_left_to_chance(tmp_path):
    base, (tuned,) = tiny_family(tmp_path, 1, dtype="bfloat16", delta=1e-4)
    vector = TaskVector.between(base, tuned)
    name = "model.embed_tokens.weight"
    nearest = vector.apply(base, tmp_path / "nearest", scale=0.3)
    assert 0.2 < nearest.tensors[name].rounding_loss < 1.5
    exact = vector.apply(base, tmp_path / "exact", scale=0.3, dtype="float32")
    assert exact.rounding_loss == 0 and load_state(tmp_path / "exact")[name].dtype == torch.float32
    chance = [vector.apply(base, tmp_path / f"c{i}", scale=0.3, rounding="stochastic", seed=i % 2) for i in range(3)]
    states = [load_state(tmp_path / f"c{i}") for i in range(3)]
    assert same_bits(states[0], states[2]) and not same_bits(states[0], states[1])
    assert chance[0].rounding_loss > nearest.rounding_loss


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 700), st.integers(0, 600))
def test_the_chunk_does_not_matter(family, vectors, chunk, start):
    a, b, _ = vectors
    vector = 0.3 * a + b
    whole = vector.expression.flat(NAME, 0, 512)
    start = min(start, 511)
    pieces = [vector.expression.flat(NAME, i, j) for i, j in sources.ranges(512, chunk)]
    assert torch.cat(pieces).equal(whole)
    assert vector.expression.flat(NAME, start, 512).equal(whole[start:])


def test_threads_do_not_matter(tmp_path, family, vectors):
    for threads in (1, 3):
        vectors[0].save(tmp_path / f"{threads}.safetensors", "lossless", threads=threads)
        vectors[1].apply(family[0], tmp_path / f"out{threads}", scale=0.7, threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()
    assert same_bits(load_state(tmp_path / "out1"), load_state(tmp_path / "out3"))


def test_the_file_says_what_it_is(tmp_path, family, vectors):
    from surgery.checkpoint import read_header
    from surgery.checkpoint.provenance import checksums, header_hash

    vectors[0].save(tmp_path / "v.safetensors")
    metadata = read_header(tmp_path / "v.safetensors").metadata
    base = open_checkpoint(family[0])
    assert json.loads(metadata["checksums"]) == checksums(base)
    about = json.loads(metadata["base"])
    assert about["name"] == "base" and about["header"] == header_hash(base)
    assert about["config"] and about["tokenizer"]
    assert metadata["definition"] == "tuned0 - base" and metadata["form"] == "float32"
    assert str(family[0].parent) not in str(metadata)  # no paths of this machine
    loaded = TaskVector.load(tmp_path / "v.safetensors")
    assert str(loaded) == "tuned0 - base"
    assert (loaded + vectors[1]).tensor(NAME).equal((vectors[0] + vectors[1]).tensor(NAME))


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """A bfloat16 pair with many equal magnitudes, over several blocks."""
    folder = tmp_path_factory.mktemp("coarse")
    g = torch.Generator().manual_seed(0)
    base = {"w": (0.02 * torch.randn(400, 901, generator=g)).bfloat16()}
    tuned = {"w": (base["w"].float() + 1e-4 * torch.randn(400, 901, generator=g)).bfloat16()}
    return TaskVector.between(save_checkpoint(folder / "b", base, {}), save_checkpoint(folder / "t", tuned, {}))


@pytest.mark.parametrize(
    "density, method, options",
    [(0.2, "magnitude", {}), (0.002, "magnitude", {}), (0.9, "magnitude", {}), (1.0, "magnitude", {}),
     (0.0, "magnitude", {}), (0.15, "breadcrumbs", {"top": 0.02}), (0.6, "breadcrumbs", {"top": 0.1})],
)  # fmt: skip
def test_sparsified_is_the_mask_of_the_reference(coarse, density, method, options):
    d = coarse.tensor("w")
    mask = sparsify.band(d, density, **options) if options else sparsify.magnitude(d, density)
    found = coarse.sparsified(density, method, **options)
    assert found.tensor("w").equal(d * mask)
    assert found.read("w", 17, 333).equal((d * mask)[17:333])


def test_sparsified_at_random(coarse):
    d = coarse.tensor("w")
    found = coarse.sparsified(0.25, "random", seed=1)
    kept = found.tensor("w") != 0
    assert found.tensor("w").equal(torch.where(kept, 4 * d, 0.0))
    assert int(kept.sum()) == pytest.approx(0.25 * int(d.count_nonzero()), rel=0.02)
    assert found.read("w", 100, 300).equal(found.tensor("w")[100:300])
    assert not coarse.sparsified(0.25, "random", seed=2).tensor("w").equal(found.tensor("w"))
    plain = coarse.sparsified(0.25, "random", seed=1, rescale="none").tensor("w")
    assert plain.equal(torch.where(kept, d, 0.0))


def test_sparsified_takes_no_nonsense(vectors):
    for density, method, options in [(1.5, "magnitude", {}), (0.5, "magnitud", {}), (0.5, "magnitude", {"top": 1})]:
        with pytest.raises(SurgeryError):
            vectors[0].sparsified(density, method, **options).tensor(NAME)


def test_merged_by_a_method(family, vectors):
    from surgery.weights.methods import METHODS

    d = [delta(family, i, NAME) for i in range(3)]
    zeros = torch.zeros_like(d[0])
    merged = TaskVector.merged(vectors, "ties", density=0.3)
    assert merged.tensor(NAME).equal(METHODS["ties"].function(d, zeros, density=0.3))
    assert merged.read(NAME, 2, 9).equal(merged.tensor(NAME)[2:9])
    random = TaskVector.merged(vectors, "dare_ties", seed=4)
    assert random.tensor(NAME).equal(TaskVector.merged(vectors, "dare_ties", seed=4).tensor(NAME))
    assert not random.tensor(NAME).equal(TaskVector.merged(vectors, "dare_ties", seed=5).tensor(NAME))
    with pytest.raises(SurgeryError, match="tie"):
        TaskVector.merged(vectors, "teis")
    with pytest.raises(SurgeryError, match="does not merge differences"):
        TaskVector.merged(vectors, "slerp")


def test_an_output_is_no_input(tmp_path):
    base, (tuned,) = tiny_family(tmp_path, 1)
    before = load_state(tuned)
    vector = TaskVector.between(base, tuned)
    for out in (base, tuned):
        with pytest.raises(SurgeryError, match="one of the inputs"):
            vector.apply(base, out, force=True)
    assert same_bits(load_state(tuned), before)
    vector.save(tmp_path / "v", "float32")
    with pytest.raises(SurgeryError, match="one of the inputs"):
        TaskVector.load(tmp_path / "v").apply(base, tmp_path / "v", force=True)


def test_an_exception_leaves_no_output(tmp_path, family, vectors, monkeypatch):
    def fail(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr("surgery.weights.apply.write_companions", fail)
    with pytest.raises((RuntimeError, TypeError)):
        vectors[0].apply(family[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
