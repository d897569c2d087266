"""Sparse deltas: taken out, stored, put in and out bit for bit, added up, compared; and files that are wrong."""

import itertools
import json
import struct

import pytest
import torch
from helpers import load_state, read_json, same_bits, save_checkpoint, tiny_checkpoint, tiny_config
from safetensors.torch import load_file, save_file

from surgery.checkpoint import read_header
from surgery.errors import SurgeryError
from surgery.weights.deltas.algebra import overlap
from surgery.weights.deltas.entries import Entry, members, place_type, smaller_whole
from surgery.weights.deltas.file import SparseDelta, is_delta
from surgery.weights.merge import merge
from surgery.weights.opening import open_model
from surgery.weights.vector import TaskVector

torch.set_num_threads(1)
NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.1.self_attn.q_proj.weight"


def tuned_copy(base, out, seed, share=0.06, dtype=None, dense=()):
    """A fine-tuning of `base` in which `share` of the numbers moved, and all of the tensors in `dense`."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in load_state(base).items():
        moved = torch.rand(tensor.shape, generator=g) < (1.0 if name in dense else share)
        noise = 0.01 * torch.randn(tensor.shape, generator=g)
        state[name] = torch.where(moved, tensor.float() + noise, tensor.float()).to(dtype or tensor.dtype)
    config = read_json(base / "config.json")
    return save_checkpoint(out, state, config)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny_checkpoint(folder / "base", dtype=request.param)
    tuned = [tuned_copy(base, folder / f"tuned{i}", i, dense=("model.norm.weight",)) for i in range(3)]
    return base, tuned


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Matrices of several reading pieces, 5 % of whose float32 numbers moved; odd shapes; one kept as it was."""
    folder = tmp_path_factory.mktemp("wide")
    g = torch.Generator().manual_seed(0)
    shapes = {"w": (1201, 1003), "v": (70001,), "s": (), "same": (9, 9), "three": (3, 50, 70), "none": (0, 4)}
    base = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    moved = {n: torch.rand(s, generator=g) < 0.05 for n, s in shapes.items()}
    tuned = {n: torch.where(moved[n], t * 1.5, t) for n, t in base.items()} | {"same": base["same"]}
    return save_checkpoint(folder / "base", base, {}), save_checkpoint(folder / "tuned", tuned, {})


class Toy(torch.nn.Module):
    """The parameters of a checkpoint under their names."""

    def __init__(self, folder):
        super().__init__()
        self.names = {}
        for i, (name, tensor) in enumerate(load_state(folder).items()):
            self.register_parameter(f"p{i}", torch.nn.Parameter(tensor))
            self.names[name] = f"p{i}"

    def state_dict(self, *args, keep_vars=False, **kwargs):
        own = dict(self.named_parameters())
        return {name: own[p] if keep_vars else own[p].detach() for name, p in self.names.items()}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- out, and in again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_set_restores_every_bit_of_the_tuned_model(tmp_path, family, place):
    base, (tuned, *_) = family
    SparseDelta.between(base, tuned if place == "folder" else Toy(tuned)).save(tmp_path / "d.safetensors")
    applied = SparseDelta.load(tmp_path / "d.safetensors").apply(base, tmp_path / "out")
    assert same_bits(load_state(tmp_path / "out"), load_state(tuned))
    assert {report.action for report in applied.tensors.values()} <= {"restored", "copied"}


def test_the_file_is_as_it_is_specified(tmp_path, wide):
    delta = SparseDelta.between(*wide, method="lift", parameters={"rank": 8})
    path = delta.save(tmp_path / "d.safetensors")
    stored, base, tuned = load_file(path), load_state(wide[0]), load_state(wide[1])
    assert stored.keys() == {f"{n}.{part}" for n in ("w", "v", "three") for part in ("idx", "val")}
    for name in ("w", "v", "three"):
        places = (base[name] != tuned[name]).view(-1).nonzero().view(-1)
        assert stored[f"{name}.idx"].dtype == torch.int32 and stored[f"{name}.idx"].equal(places.int())
        assert stored[f"{name}.val"].equal(tuned[name].view(-1)[places])
    about = read_header(path).metadata
    assert all(isinstance(value, str) for value in about.values())
    assert (about["kind"], about["format_version"], about["mode"], about["method"]) == (
        "sparse delta",
        "1",
        "set",
        "lift",
    )
    assert json.loads(about["parameters"]) == {"rank": 8} and json.loads(about["base"])["name"] == "base"
    assert json.loads(about["shapes"])["three"] == [3, 50, 70]
    assert json.loads(about["checksums"]).keys() == {"w", "v", "three"}  # the touched tensors of the base
    assert float(about["density"]) == pytest.approx(delta.count / sum(t.numel() for t in base.values()))


def test_bytes_for_each_entry(tmp_path, wide):
    for mode, dtype, most in (("set", None, 8.1), ("add", "float32", 8.1), ("add", "bfloat16", 6.1)):
        delta = SparseDelta.between(*wide, mode, dtype=dtype)
        assert delta.count > 50_000
        assert delta.save(tmp_path / "d.safetensors", force=True).stat().st_size / delta.count <= most


def test_a_tensor_that_moved_widely_is_whole_where_that_is_smaller(family, tmp_path):
    base, (tuned, *_) = family
    delta = SparseDelta.between(base, tuned)
    assert [n for n, e in delta.entries.items() if e.places is None] == ["model.norm.weight"]
    assert "model.norm.weight" in load_file(delta.save(tmp_path / "d.safetensors"))
    assert [smaller_whole(k, 12, "BF16") for k in (3, 4)] == [False, True]  # 6 bytes against 2: a third
    assert [smaller_whole(k, 12, "F32") for k in (5, 6)] == [False, True]  # 8 bytes against 4: half
    assert (place_type(2**31 - 1), place_type(2**31)) == (torch.int32, torch.int64)


def test_add_is_the_difference_and_stands_alone(tmp_path, family):
    base, (tuned, *_) = family
    exact = TaskVector.between(base, tuned)
    SparseDelta.between(base, tuned, "add").save(tmp_path / "d.safetensors")
    loaded = TaskVector.load(tmp_path / "d.safetensors")
    for name in loaded.names:
        assert loaded.tensor(name).equal(exact.tensor(name)), name
    derived = SparseDelta.between(base, tuned).added()
    assert all(derived.vector().tensor(n).equal(exact.tensor(n)) for n in loaded.names)


def test_another_type_than_the_base(tmp_path, family):
    base, _ = family
    tuned = tuned_copy(base, tmp_path / "half", 7, dtype=torch.float16)
    delta = SparseDelta.between(base, tuned)
    delta.apply(base, tmp_path / "out")
    assert same_bits(load_state(tmp_path / "out"), load_state(tuned))
    assert delta.vector().tensor(NAME).equal(TaskVector.between(base, tuned).tensor(NAME))


def test_a_selection_limits_what_is_kept_and_the_rest_is_counted(tmp_path, family):
    base, (tuned, *_) = family
    differs = (load_state(base)[NAME] != load_state(tuned)[NAME]).view(-1).nonzero().view(-1)
    inside = differs[::2].contiguous()
    whole = SparseDelta.between(base, tuned, only={OTHER: None})
    limited = SparseDelta.between(base, tuned, only={NAME: inside.int(), OTHER: None})
    assert limited.entries[NAME].places.equal(inside.int())
    assert limited.parameters["outside"] == differs.numel() - inside.numel()
    assert limited.count == whole.count + inside.numel() and "outside" not in whole.parameters
    with pytest.raises(SurgeryError, match="another model.*'nowhere'"):
        SparseDelta.between(base, tuned, only={"nowhere": None})


def test_a_selection_of_the_house_fits(family):
    from surgery.tuning import Selection

    base, (tuned, *_) = family
    chosen = Selection.of_masks({NAME: load_state(base)[NAME] != load_state(tuned)[NAME]}, "delta")
    delta = SparseDelta.between(base, tuned, only=chosen)
    assert delta.method == "delta" and list(delta.entries) == [NAME] and delta.count == chosen.count


def test_a_tied_model_and_a_head_of_its_own(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", tied=True)
    tied = tuned_copy(base, tmp_path / "tied", 1)
    SparseDelta.between(base, tied).apply(base, tmp_path / "a")
    assert same_bits(load_state(tmp_path / "a"), load_state(tied))
    state = load_state(base) | {"lm_head.weight": load_state(base)["model.embed_tokens.weight"].clone()}
    untied = save_checkpoint(tmp_path / "untied", state, tiny_config())
    SparseDelta.between(base, untied).save(tmp_path / "d.safetensors")  # the head is new though it is the embedding
    SparseDelta.load(tmp_path / "d.safetensors").apply(base, tmp_path / "b")
    assert same_bits(load_state(tmp_path / "b"), state)
    assert read_json(tmp_path / "b" / "config.json")["tie_word_embeddings"] is False


def test_of_keeps_what_a_vector_keeps(family):
    base, (tuned, *_) = family
    vector = TaskVector.between(base, tuned).sparsified(0.02)
    delta = SparseDelta.of(vector)
    assert all(delta.vector().tensor(n).equal(vector.tensor(n)) for n in delta.entries)
    assert 0 < delta.count < 0.03 * delta.total and delta.mode == "add" and delta.base["name"] == "base"


# ---- a vector like any other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["set", "add"])
def test_it_is_a_task_vector_like_any_other(tmp_path, family, mode):
    base, tuned = family
    dense = [TaskVector.between(base, t) for t in tuned[:2]]
    paths = [SparseDelta.between(base, t, mode).save(tmp_path / f"{i}.safetensors") for i, t in enumerate(tuned[:2])]
    sparse = [TaskVector.load(path, base if mode == "set" else None) for path in paths]
    made = lambda a, b: [  # noqa: E731
        a + b, 0.5 * a - b, a.only("mlp").scaled(gradient=[0, 1]), a.sparsified(0.03), a.low_rank(2),
        TaskVector.merged([a, b], "ties", density=0.5), TaskVector.merged([a, b], "breadcrumbs", density=0.5),
        a + dense[1],
    ]  # fmt: skip
    for found, wanted in zip(made(*sparse), made(*dense), strict=True):
        assert found.tensor(NAME).equal(wanted.tensor(NAME)), str(found)
    sparse[0].save(tmp_path / "again.safetensors", "float32")
    (2 * sparse[0]).apply(base, tmp_path / "out")
    (2 * dense[0]).apply(base, tmp_path / "wanted")
    assert same_bits(load_state(tmp_path / "out"), load_state(tmp_path / "wanted"))
    whole = sparse[0].expression.flat(NAME, 0, 512)
    assert all(
        sparse[0].expression.flat(NAME, a, b).equal(whole[a:b]) for a, b in [(0, 1), (3, 400), (511, 512), (9, 9)]
    )


def test_set_needs_its_base_for_numbers_and_says_so(tmp_path, family):
    base, tuned = family
    path = SparseDelta.between(base, tuned[0]).save(tmp_path / "d.safetensors")
    for use in (lambda: TaskVector.load(path).tensor(NAME), lambda: SparseDelta.load(path).added()):
        with pytest.raises(SurgeryError, match="its base is needed"):
            use()
    assert (
        SparseDelta.load(path)
        .added(base)
        .vector()
        .tensor(NAME)
        .equal(SparseDelta.load(path, base).vector().tensor(NAME))
    )


@pytest.mark.parametrize("mode", ["set", "add"])
def test_a_wrong_base_is_refused_by_its_checksum(tmp_path, family, mode):
    base, tuned = family
    delta = SparseDelta.load(SparseDelta.between(base, tuned[0], mode).save(tmp_path / "d.safetensors"))
    state = load_state(base)
    state[NAME][0, 0] += 1
    wrong = save_checkpoint(tmp_path / "wrong", state, read_json(base / "config.json"))
    uses = {"apply": lambda: delta.apply(wrong, tmp_path / "out")}
    if mode == "set":
        uses |= {
            "read": lambda: delta.vector(wrong).tensor(NAME), "added": lambda: delta.added(wrong),
            "memory": lambda: delta.apply_to(Toy(wrong)), "compose": lambda: SparseDelta.compose([delta, delta], wrong),
        }  # fmt: skip
    for name, use in uses.items():
        with pytest.raises(SurgeryError, match=f"'{NAME}'.*(other numbers|not that of the base)"):
            use()
        assert not (tmp_path / "out").exists(), name
    cut = save_checkpoint(tmp_path / "cut", {n: t for n, t in state.items() if n != OTHER}, tiny_config())
    with pytest.raises(SurgeryError, match="not the base"):
        delta.bound(cut)
    delta.apply(wrong, tmp_path / "out", transfer=True) if mode == "add" else None


@pytest.mark.parametrize("mode", ["set", "add"])
def test_a_base_with_a_delta_is_a_model_for_merges(tmp_path, family, mode):
    base, tuned = family
    paths = [SparseDelta.between(base, t, mode).save(tmp_path / f"{i}.safetensors") for i, t in enumerate(tuned[:2])]
    for out, models in (("ours", [f"{base}+{path}" for path in paths]), ("wanted", list(map(str, tuned[:2])))):
        recipe = {"merge_method": "ties", "base_model": str(base), "models": [{"model": m} for m in models],
                  "parameters": {"density": 0.5, "weight": 1.0}}  # fmt: skip
        merge(recipe, tmp_path / out, threads=1)
    ours, wanted = load_state(tmp_path / "ours"), load_state(tmp_path / "wanted")
    if mode == "set":
        assert same_bits(ours, wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=0.01, atol=1e-6)
    source = open_model(f"{base}+{paths[0]}")
    state = load_state(tuned[0])
    for name in source.tensors:
        whole = source.read(name)
        assert whole.shape == state[name].shape and source.read(name, 1, 3).equal(whole[1:3])
        torch.testing.assert_close(whole.float(), state[name].float(), rtol=0, atol=1e-7)
    vector = TaskVector.between(base, f"{base}+{paths[1]}")
    torch.testing.assert_close(vector.tensor(NAME), TaskVector.between(base, tuned[1]).tensor(NAME), rtol=0, atol=1e-7)
    with pytest.raises(SurgeryError, match="other numbers"):
        open_model(f"{tuned[2]}+{paths[0]}")
    with pytest.raises(SurgeryError, match="not a sparse delta"):
        open_model(f"{base}+{base}/model.safetensors")


def test_a_tied_base_with_a_delta_that_has_a_head_is_no_longer_tied(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", tied=True)
    state = load_state(base) | {"lm_head.weight": load_state(base)["model.embed_tokens.weight"] + 1}
    untied = save_checkpoint(tmp_path / "untied", state, tiny_config())
    path = SparseDelta.between(base, untied).save(tmp_path / "d.safetensors")
    source = open_model(f"{base}+{path}")
    assert source.config["tie_word_embeddings"] is False and source.tensors.keys() == state.keys()
    assert all(source.read(name).equal(tensor) for name, tensor in state.items())


# ---- and out again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["set", "add"])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_in_memory_it_comes_and_goes_bit_for_bit(family, mode, scale):
    base, (tuned, *_) = family
    delta, model = SparseDelta.between(base, tuned, mode), Toy(base)
    before = bits(model)
    undo = delta.apply_to(model, scale)
    after = bits(model)
    if (mode, scale) == ("set", 1.0):
        assert same_bits(after, load_state(tuned))
    else:
        exact = TaskVector.between(base, tuned)
        wanted = {n: (before[n].float() + scale * exact.tensor(n)).to(before[n].dtype) for n in before}
        assert all(torch.equal(after[n], wanted[n]) for n in after)
    sizes = [4 * (e.places is not None) + before[n].element_size() for n, e in delta.entries.items()]
    assert undo.nbytes == sum(size * e.count for size, e in zip(sizes, delta.entries.values(), strict=True))
    undo()
    assert same_bits(bits(model), before)
    undo()
    assert same_bits(bits(model), before)
    with pytest.raises(ZeroDivisionError), delta.applied(model):
        1 / 0  # noqa: B018
    assert same_bits(bits(model), before)


def test_an_exception_on_the_way_leaves_the_model_as_it_was(family):
    base, (tuned, *_) = family
    delta, model = SparseDelta.between(base, tuned, "add"), Toy(base)
    before = bits(model)
    with pytest.raises(SurgeryError, match="beyond"):
        delta.apply_to(model, 1e38 * 1e3 / 10)
    assert same_bits(bits(model), before)
    with pytest.raises(SurgeryError, match="scale"):
        delta.apply_to(model, float("nan"))


def test_a_base_that_was_widened_when_it_was_loaded_is_known(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", dtype="bfloat16")
    model = Toy(base).float()
    tuned = Toy(base).float()
    with torch.no_grad():
        tuned.get_parameter(tuned.names[NAME]).view(-1)[::7] += 1e-5
    delta = SparseDelta.between(base, tuned)
    with delta.applied(model):
        assert same_bits(bits(model), bits(tuned))
    with torch.no_grad():  # below what the file's type can tell, and still not the base
        model.get_parameter(model.names[NAME]).view(-1)[0] += 1e-7
    with pytest.raises(SurgeryError, match="not that of the base"):
        delta.apply_to(model)
    delta.apply_to(model, transfer=True)


@pytest.mark.parametrize("mode", ["set", "add"])
def test_on_disk_the_undo_file_is_the_way_back(tmp_path, family, mode):
    base, (tuned, *_) = family
    delta = SparseDelta.between(base, tuned, mode)
    delta.apply(base, tmp_path / "out", scale=1.0 if mode == "set" else 0.5, undo=tmp_path / "back.safetensors")
    back = SparseDelta.load(tmp_path / "back.safetensors")
    back.apply(tmp_path / "out", tmp_path / "again")
    assert back.method == "undo" and same_bits(load_state(tmp_path / "again"), load_state(base))
    with pytest.raises(SurgeryError, match="exists"):
        delta.apply(base, tmp_path / "other", undo=tmp_path / "back.safetensors")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("mode", ["set", "add"])
def test_revert_takes_it_out_and_leaves_what_else_was_done(tmp_path, family, mode):
    base, (tuned, *_) = family
    delta = SparseDelta.load(SparseDelta.between(base, tuned, mode).save(tmp_path / "d.safetensors"))
    delta.apply(base, tmp_path / "out")
    state = load_state(tmp_path / "out")
    free = next(i for i in range(100) if i not in delta.entries[NAME].places.tolist())
    state[NAME].view(-1)[free] = 7
    later = save_checkpoint(tmp_path / "later", state, read_json(base / "config.json"))
    delta.revert(later, tmp_path / "back", base)
    wanted = load_state(base)
    wanted[NAME].view(-1)[free] = 7
    assert same_bits(load_state(tmp_path / "back"), wanted)
    with pytest.raises(SurgeryError, match="does not hold"):
        delta.revert(base, tmp_path / "no", base)
    with pytest.raises(SurgeryError, match="base is needed"):
        delta.revert(later, tmp_path / "no")


# ---- several -------------------------------------------------------------------------------------------------------


def test_compose_is_the_sum_in_any_order_to_the_bit(family):
    base, tuned = family
    deltas = [SparseDelta.between(base, t) for t in tuned]
    sums = [SparseDelta.compose(order) for order in itertools.permutations(deltas)]
    dense = sum(TaskVector.between(base, t) for t in tuned)
    for name in sums[0].entries:
        first = sums[0].entries[name]
        torch.testing.assert_close(sums[0].vector().tensor(name), dense.tensor(name), rtol=0, atol=1e-8)
        for other in sums[1:]:
            same = other.entries[name]
            assert same.values.view(torch.int32).equal(first.values.view(torch.int32)), name
            assert first.places is None or same.places.equal(first.places)
    union = set().union(*(d.entries[NAME].places.tolist() for d in deltas))
    assert set(sums[0].entries[NAME].places.tolist()) == union and sums[0].mode == "add"


def test_compose_scales_and_refuses(tmp_path, family):
    base, tuned = family
    a, b = (SparseDelta.between(base, t, "add") for t in tuned[:2])
    found = SparseDelta.compose([a, b], scales=[2.0, -1.0])
    wanted = 2 * a.vector() - b.vector()
    torch.testing.assert_close(found.vector().tensor(NAME), wanted.tensor(NAME), rtol=0, atol=1e-8)
    assert found.definition == "2*(tuned0 - base) + -1*(tuned1 - base)"
    foreign = tuned_copy(tuned[2], tmp_path / "foreign", 5)
    other = SparseDelta.between(tuned[2], foreign, "add")
    with pytest.raises(SurgeryError, match="two different bases"):
        SparseDelta.compose([a, other])
    with pytest.raises(SurgeryError, match="scales"):
        SparseDelta.compose([a, b], scales=[1.0])


def hand_made(places, values, shape=(4, 5), mode="add"):
    entry = Entry(shape, torch.tensor(places, dtype=torch.int32), torch.tensor(values))
    return SparseDelta({"w": entry}, mode, None, {}, 20, "hand made")


def test_overlap_counts_places_and_signs():
    a = hand_made([0, 3, 7, 19], [1.0, -1.0, 2.0, 0.0])
    b = hand_made([3, 7, 8, 11, 19], [-2.0, -2.0, 1.0, 1.0, 5.0])
    whole = SparseDelta({"w": Entry((4, 5), None, torch.ones(20))}, "add", None, {}, 20, "whole")
    found = overlap({"a": a, "b": b, "whole": whole})
    pair = found.pairs[0, 1]
    assert (pair.counts, pair.common, pair.signed, pair.agreeing) == ((4, 5), 3, 2, 1)
    assert pair.overlap == 3 / 4 and pair.agreement == 1 / 2 and pair.chance == pytest.approx(5 / 20)
    assert found.pairs[0, 2].overlap == 1.0 and found.pairs[0, 2].agreement == pytest.approx(2 / 3)
    assert found.matrix()[1][0] == 3 / 4 and found.rows("tensor")[0]["tensor"] == "w"
    assert overlap([whole, whole]).pairs[0, 1].common == 20
    sets = overlap([hand_made([1], [1.0], mode="set")] * 2)
    assert sets.pairs[0, 1].overlap == 1 and sets.pairs[0, 1].signed is None
    apart = overlap([hand_made([1], [1.0]), hand_made([2], [1.0])]).pairs[0, 1]
    assert apart.overlap == 0 and apart.agreement != apart.agreement
    with pytest.raises(SurgeryError, match="two deltas"):
        overlap([a])
    with pytest.raises(SurgeryError, match="'w' is"):
        overlap([a, hand_made([1], [1.0], shape=(5, 4))])


def test_overlap_of_models_is_that_of_their_numbers(family):
    base, tuned = family
    deltas = [SparseDelta.between(base, t) for t in tuned[:2]]
    states = [load_state(folder) for folder in (base, *tuned[:2])]
    moved = [states[i][NAME] != states[0][NAME] for i in (1, 2)]
    signs = [(states[i][NAME].float() - states[0][NAME].float()).sign() for i in (1, 2)]
    both = moved[0] & moved[1]
    found = overlap(deltas).tensors[0, 1][NAME]
    assert found.common == int(both.sum()) and found.counts == tuple(int(m.sum()) for m in moved)
    assert found.agreeing == int((signs[0] == signs[1])[both].sum())


def test_members_of_positions():
    places = torch.tensor([1, 4, 9], dtype=torch.int32)
    assert members(places, torch.tensor([0, 4, 9, 12])).tolist() == [False, True, True]
    assert members(places, torch.tensor([], dtype=torch.int64)).tolist() == [False] * 3
    assert members(torch.tensor([2**33]), torch.tensor([5], dtype=torch.int32)).tolist() == [False]


# ---- files that are wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path):
    g = torch.Generator().manual_seed(3)
    base = {"w": torch.randn(40, 50, generator=g), "b": torch.randn(7, generator=g)}
    tuned = {"w": base["w"].clone(), "b": base["b"] + 1}
    tuned["w"].view(-1)[::100] += 1
    a, b = (save_checkpoint(tmp_path / n, s, {}) for n, s in (("base", base), ("tuned", tuned)))
    path = SparseDelta.between(a, b).save(tmp_path / "good.safetensors")
    return path, load_file(path), dict(read_header(path).metadata)


def change(key, value):
    return lambda tensors, about: tensors.update({key: value})


def say(key, value):
    return lambda tensors, about: about.update({key: value})


IDX = torch.arange(0, 2000, 100, dtype=torch.int32)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (change("w.idx", IDX.flip(0)), "do not ascend"),
        (change("w.idx", IDX // 200 * 200), "do not ascend"),
        (change("w.idx", IDX - 1), "negative position, -1"),
        (change("w.idx", IDX + 100), "no position 2,000"),
        (change("w.idx", IDX.short()), "I16"),
        (change("w.idx", IDX.float()), "F32"),
        (change("w.idx", IDX[:-1].clone()), "19 positions and 20 values"),
        (change("w.idx", IDX.view(2, 10)), r"I32 \[2, 10\]"),
        (change("w.val", torch.full((20,), float("nan"))), "NaN"),
        (change("w.val", torch.ones(20, dtype=torch.int32)), "values I32"),
        (lambda t, a: t.pop("w.val"), "lacks 'w.val'"),
        (lambda t, a: t.pop("b"), "lacks 'b.idx'"),
        (change("w", torch.zeros(40, 50)), "is there twice"),
        (change("b", torch.zeros(8)), r"'b' is F32 \[8\]"),
        (change("more.idx", IDX), "'more.idx'"),
        (say("kind", "task vector"), "not a sparse delta"),
        (say("format_version", "2"), "format version 2"),
        (say("mode", "multiply"), "broken metadata.*mode"),
        (say("shapes", "{"), "broken metadata"),
        (say("shapes", "[" * 100_000), "broken metadata"),
        (say("shapes", '{"w":[40,-50],"b":[7]}'), "broken metadata.*shape of w"),
        (say("shapes", '{"w":[4000000000000,5000000000000],"b":[7]}'), "broken metadata.*shape of w"),
        (say("shapes", '{"w":[65536,65536],"b":[7]}'), "int64 positions"),
        (say("shapes", '{"w":[3,3],"b":[7]}'), "of 9 numbers"),
        (say("shapes", '{"w":true}'), "broken metadata"),
        (say("checksums", '{"w":1}'), "broken metadata.*checksums"),
        (say("base", "3"), "broken metadata.*base"),
        (say("total", "-1"), "broken metadata.*total"),
        (lambda t, a: a.pop("shapes"), "broken metadata.*shapes"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_gets_a_sentence(tmp_path, good, harm, told):
    path, tensors, about = good
    assert SparseDelta.load(path).count == 27 and is_delta(path)
    harm(tensors, about)
    save_file(tensors, tmp_path / "bad.safetensors", about)
    with pytest.raises(SurgeryError, match=told):
        SparseDelta.load(tmp_path / "bad.safetensors")


def test_sizes_are_looked_at_before_memory_is_taken(tmp_path, good):
    path, _, about = good
    header = {"__metadata__": about, "w.idx": {"dtype": "I32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}
    text = json.dumps(header).encode()
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(SurgeryError, match="cut off"):
        SparseDelta.load(tmp_path / "huge.safetensors")
    whole = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    with pytest.raises(SurgeryError, match="cut off"):
        SparseDelta.load(tmp_path / "cut.safetensors")


def test_int64_positions_are_read_too(tmp_path, good):
    path, tensors, about = good
    tensors["w.idx"] = tensors["w.idx"].long()
    save_file(tensors, tmp_path / "long.safetensors", about)
    assert (
        SparseDelta.load(tmp_path / "long.safetensors")
        .vector(tmp_path / "base")
        .tensor("w")
        .equal(SparseDelta.load(path).vector(tmp_path / "base").tensor("w"))
    )


def test_what_can_not_be_done_is_a_sentence(tmp_path, family):
    base, (tuned, *_) = family
    delta = SparseDelta.between(base, tuned)
    path = delta.save(tmp_path / "d.safetensors")
    for use, told in (
        (lambda: delta.save(path), "exists"),
        (lambda: delta.save(tmp_path / "d"), "no name for it"),
        (lambda: SparseDelta.between(base, base), "same"),
        (lambda: SparseDelta.between(base, tuned, "multiply"), "mode is 'multiply'"),
        (lambda: SparseDelta.between(base, tuned, dtype="bfloat16"), "takes no dtype"),
        (lambda: SparseDelta.load(tmp_path / "nowhere.safetensors"), "no file"),
        (lambda: SparseDelta.load(base), "not a sparse delta"),
        (lambda: delta.restricted(["nowhere"]), "Nothing is left"),
        (lambda: delta.apply_to(torch.nn.Linear(2, 2)), "no tensor"),
    ):
        with pytest.raises(SurgeryError, match=told):
            use()
    assert delta.save(path, force=True) == path and not list(tmp_path.glob(".*"))
    bad = load_state(tuned)
    bad[NAME][0, 0] = float("nan")
    nan = save_checkpoint(tmp_path / "nan", bad, read_json(base / "config.json"))
    with pytest.raises(SurgeryError, match=f"'{NAME}' has values that are NaN"):
        SparseDelta.between(base, nan)


def test_models_that_do_not_differ_make_a_delta_of_nothing(tmp_path, family):
    base, _ = family
    same = save_checkpoint(tmp_path / "same", load_state(base), read_json(base / "config.json"))
    loaded = SparseDelta.load(SparseDelta.between(base, same).save(tmp_path / "d.safetensors"))
    assert loaded.count == 0 and len(loaded) == 0
    loaded.apply(base, tmp_path / "out")
    assert same_bits(load_state(tmp_path / "out"), load_state(base))


# ---- SmolLM2 -------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2_five_per_cent(tmp_path):
    from surgery import models

    model, _ = models.load("smollm2")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                at = torch.randint(parameter.numel(), (parameter.numel() // 20,), generator=g)
                parameter.view(-1)[at] *= 1.5
    delta = SparseDelta.between("smollm2", model)
    path = delta.save(tmp_path / "d.safetensors")
    assert delta.count > 4_000_000
    item = next(iter(delta.entries.values())).values.element_size()
    assert path.stat().st_size / delta.count <= 4 + item + 0.1
    fresh, _ = models.load("smollm2")
    before = bits(fresh)
    undo = SparseDelta.load(path).apply_to(fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    undo()
    assert same_bits(bits(fresh), before)
    added = delta.added()
    twice = SparseDelta.compose([added, added.restricted([n for n in added.entries if "mlp" in n])])
    assert overlap([added, twice]).pairs[0, 1].overlap == 1.0
    assert overlap([added, twice]).pairs[0, 1].agreement == 1.0
