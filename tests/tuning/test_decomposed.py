"""CorDA changes nothing at first and exports to the original weights; covariances don't see padding; LoRA's sizes."""

import copy
import dataclasses
import sys
import types

import pytest
import torch
from activations.families import build
from torch import nn

from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.tuning.decomposed import (
    changes_base,
    corda,
    covariances,
    damped,
    decompose,
    export,
    lora,
    lora_rank_for,
    lora_size,
    merged,
    projections,
)

torch.set_num_threads(1)
TEXTS = ["m 1+1=", "m 22+21=", "c abc=", "m 3+14-2="]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-base")


@pytest.fixture(scope="module")
def seen(tiny):
    """Covariances of four texts, which leave most directions unseen: damping matters."""
    return covariances(tiny[0], [encode(tiny[1], TEXTS)])


def logits(model, tokenizer):
    batch = encode(tokenizer, TEXTS)
    with torch.no_grad():
        return model(**batch.inputs(model)).logits[batch.mask]


def nudged(tuned, size=0.02):
    """Training stood in for: every number that moves, moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return tuned


# ---- modules


def test_all_projections_of_attention_and_mlp_are_found():
    names = list(projections(build("llama")))
    assert len(names) == 3 * 7 and all(n.startswith("model.layers.") for n in names)
    assert all("c_" in n for n in projections(build("gpt2"))) and len(projections(build("gpt2"))) == 3 * 4
    assert set(projections(build("llama"), ["attention"])) == {n for n in names if "self_attn" in n}
    assert set(projections(build("llama"), ["q", names[6]])) == {n for n in names if "q_proj" in n} | {names[6]}
    assert list(projections(build("llama"), f"{names[6]}.weight")) == [names[6]]


def test_names_are_matched_in_full_never_by_a_part(tiny):
    """PEFT would take a list of names by their ends, and a pattern's dot for any letter."""
    pytest.importorskip("peft")
    model = copy.deepcopy(tiny[0])
    model.extra = nn.ModuleDict(
        {"model": nn.ModuleDict({"layers": nn.ModuleList([copy.deepcopy(model.model.layers[0])])})}
    )
    name = "model.layers.0.self_attn.q_proj"
    tuned = lora(model, rank=2, modules=[name])
    assert [n for n, m in tuned.get_base_model().named_modules() if hasattr(m, "lora_A")] == [name]


@pytest.mark.parametrize(
    "kind, word, told",
    [
        ("gpt2", "q", "it is part of .*c_attn.*\\sAsk for 'qkv'"),
        ("phi3", "up", "it is part of .*gate_up_proj.*\\sAsk for 'gate_up'"),
        ("llama", "q_prj", "'q_prj' is neither a kind or group"),
        ("llama", "head", "no linear layers of attention or MLPs"),
    ],
)
def test_modules_that_are_not_there_are_told(kind, word, told):
    with pytest.raises(SurgeryError, match=told):
        projections(build(kind), [word])


def test_quantised_weights_are_not_decomposed(tiny, seen):
    """A plain LoRA may stand beside them: PEFT's affair."""
    model = copy.deepcopy(tiny[0])
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(SurgeryError, match=r"are quantised \(torch.int8\)"):
        corda(model, seen, rank=2)
    assert lora_size(model, 1) == lora_size(tiny[0], 1)


# ---- covariances


def rows_read(model, name, batch):
    """(tokens, in) what a module reads, by a hook of its own."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(**batch.inputs(model))
    handle.remove()
    return found[0][batch.mask]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_nor_does_the_cut_into_batches(tiny, seen, side):
    """One text at a time, in twos, or padded on either side: 1e-5 of the largest entry."""
    model, tokenizer = tiny
    for size in (1, 2, 4):
        cut = [encode(tokenizer, TEXTS[i : i + size], side=side) for i in range(0, 4, size)]
        found = covariances(model, cut)
        assert found.keys() == seen.keys() == projections(model).keys()
        for name, value in found.items():
            assert (value - seen[name]).abs().max() <= 1e-5 * seen[name].abs().max(), name


def test_they_are_means_over_tokens_of_the_products(tiny, seen):
    batch = encode(tiny[1], TEXTS)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.3.mlp.down_proj"):
        rows = rows_read(tiny[0], name, batch)
        assert torch.allclose(seen[name], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_modules_that_read_one_tensor_share_one_matrix(seen):
    at = "model.layers.2."
    q, k, v, o = (seen[f"{at}self_attn.{x}_proj"] for x in "qkvo")
    gate, up, down = (seen[f"{at}mlp.{x}_proj"] for x in ("gate", "up", "down"))
    assert q is k and k is v and gate is up
    assert len({id(m) for m in (q, o, gate, down)}) == 4


def test_experts_read_tokens_of_their_own(tiny):
    """A mixture with a shared expert: rows of one length are read, padded ones are refused in a sentence."""
    model = build("mixtral")
    model.model.layers[0].mlp = nn.Sequential()
    model.model.layers[0].mlp.add_module("experts", Halves(32))
    full = torch.arange(1, 13).view(2, 6)
    assert "model.layers.0.mlp.experts.up_proj" in covariances(model, [full])
    mask = torch.ones_like(full)
    mask[0, 4:] = 0
    with pytest.raises(SurgeryError, match="which of them are padding can't be told"):
        covariances(model, [{"input_ids": full, "attention_mask": mask}])


class Halves(nn.Module):
    """Reads half of the tokens, as an expert does."""

    def __init__(self, width):
        super().__init__()
        self.up_proj = nn.Linear(width, width)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1]).clone()
        flat[::2] = self.up_proj(flat[::2])
        return flat.view_as(x)


def test_the_model_is_left_as_it_was_also_after_an_error(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.train().requires_grad_(False)
    model.lm_head.requires_grad_(True)

    def state():
        return (
            [m.training for m in model.modules()],
            [(p.requires_grad, p.grad, p._version) for p in model.parameters()],
            [len(m._forward_pre_hooks) for m in model.modules()],
            model.config.use_cache,
        )

    before = state()
    covariances(model, [encode(tokenizer, TEXTS)])
    assert state() == before

    def broken():
        yield encode(tokenizer, TEXTS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        covariances(model, broken())
    assert state() == before


def test_no_batches_and_broken_activations_are_told(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    with pytest.raises(SurgeryError, match="No batches"):
        covariances(model, [])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(SurgeryError, match="layers.1.mlp.down_proj' reads holds NaN or infinite"):
        covariances(model, [encode(tokenizer, TEXTS)])


# ---- the decomposition


def test_damping_doubles_until_the_inverse_is_one():
    """A covariance of one direction: from 1e-9 on it takes several doublings in float32, from 0.01 on none."""
    x = torch.linspace(-1, 1, 64)[:, None]
    covariance = x @ x.T
    fixed, inverse, damping = damped(covariance)
    assert damping == 0.01
    fixed, inverse, damping = damped(covariance, 1e-9)
    doublings = torch.log2(torch.tensor(damping / 1e-9)).item()
    assert doublings >= 2 and doublings == pytest.approx(round(doublings), abs=1e-4)
    assert torch.dist(fixed @ inverse, torch.eye(64)) < 0.05
    assert torch.allclose(fixed, covariance + damping * covariance.diagonal().mean() * torch.eye(64))
    for bad in (torch.zeros(4, 4), torch.full((4, 4), float("nan"))):
        with pytest.raises(SurgeryError, match="0 or not finite"):
            damped(bad)


def test_the_two_modes_are_the_two_ends_of_one_decomposition():
    """s B A of the r largest and of the other smallest components add up to W (2e-4 of its largest number)."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 16, generator=generator), torch.randn(200, 16, generator=generator)
    fixed, inverse, _ = damped(x.T @ x / 200)
    first, last = (decompose(weight, fixed, inverse, r, m, 2.0) for r, m in ((5, "ipm"), (11, "kpm")))
    assert first[0].shape == (5, 16) and first[1].shape == (24, 5)
    whole = 2.0 * (first[1] @ first[0] + last[1] @ last[0])
    assert (whole - weight).abs().max() <= 2e-4 * weight.abs().max()
    # the r largest lose least of the outputs W x on the text itself, weighted as svd(W C) weighs them
    lost = [
        ((weight - 2.0 * b @ a) @ fixed).norm() for a, b in (first, decompose(weight, fixed, inverse, 5, "kpm", 2.0))
    ]
    values = torch.linalg.svdvals(weight @ fixed)
    assert float(lost[0]) == pytest.approx(float(values[5:].norm()), rel=1e-4)
    assert float(lost[1]) == pytest.approx(float(values[:-5].norm()), rel=1e-4)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_the_model_is_the_same_and_its_base_is_the_rest(tiny, seen, mode, alpha):
    """W_res + s B A = W to 1e-5, logits to 1e-4; only A and B move; what moves is the largest part, or the smallest."""
    pytest.importorskip("peft")
    model, tokenizer = tiny
    tuned = corda(copy.deepcopy(model), seen, rank=6, mode=mode, alpha=alpha)
    assert (logits(tuned, tokenizer) - logits(model, tokenizer)).abs().max() <= 1e-4
    shares = []
    for name, module in projections(model).items():
        layer = tuned.get_base_model().get_submodule(name)
        assert layer.scaling["default"] == (1.0 if alpha is None else 2.0)
        part = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert (layer.get_base_layer().weight + part - module.weight).abs().max() <= 1e-5
        shares.append((part.norm() / module.weight.norm()).item())
    assert all(share > 0.25 for share in shares) if mode == "ipm" else all(share < 0.15 for share in shares)
    moving = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert len(moving) == 56 and all("lora_" in n for n in moving)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == lora_size(model, 6)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "opt", "gpt_neox"])
def test_other_families_too(kind, tmp_path):
    """GPT-2's transposed and biased matrices, fused ones, MLPs that read rows laid end to end: logits to 1e-4."""
    peft = pytest.importorskip("peft")
    model = build(kind)
    ids = torch.arange(1, 13).view(2, 6)
    before = model(ids).logits
    original = copy.deepcopy(model)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    tuned = corda(model, covariances(model, [{"input_ids": ids, "attention_mask": mask}]), rank=3)
    assert (tuned(ids).logits - before).abs().max() <= 1e-4 * before.abs().max()
    after = nudged(tuned)(ids).logits
    assert (after - before).abs().max() > 1e-2
    back = peft.PeftModel.from_pretrained(original, export(tuned, tmp_path / "adapter"))
    assert (back(ids).logits - after).abs().max() <= 1e-4 * after.abs().max()
    assert (merged(tuned)(ids).logits - after).abs().max() <= 1e-4 * after.abs().max()


# ---- export


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_export_turns_the_original_into_the_trained_model(tiny, seen, mode, tmp_path):
    """Read by PEFT, by our loader and as a task vector: logits to 1e-4, weights to 1e-5."""
    peft = pytest.importorskip("peft")
    from surgery.weights.vector import TaskVector

    model, tokenizer = tiny
    tuned = nudged(corda(copy.deepcopy(model), seen, rank=5, mode=mode, alpha=10))
    assert changes_base(tuned)
    out = export(tuned, tmp_path / "adapter")
    trained = logits(tuned, tokenizer)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), out)
    assert back.peft_config["default"].r == 10
    assert (logits(back, tokenizer) - trained).abs().max() <= 1e-4
    assert (logits(load(f"tiny-base+{out}")[0], tokenizer) - trained).abs().max() <= 1e-4
    plain = merged(tuned)
    assert not hasattr(plain, "peft_config") and type(plain) is type(model)
    assert changes_base(tuned) and not changes_base(plain)
    vector = TaskVector.from_adapter(str(model.config._name_or_path), out)
    assert set(vector.shapes) == {f"{n}.weight" for n in projections(model)}
    for name in vector.shapes:
        change = plain.get_parameter(name) - model.get_parameter(name)
        assert (vector.tensor(name) - change).abs().max() <= 1e-5
    with pytest.raises(SurgeryError, match="exists already"):
        export(tuned, out)


def test_what_peft_itself_saves_says_that_it_fits_no_other_base(tiny, seen, tmp_path):
    pytest.importorskip("peft")
    corda(copy.deepcopy(tiny[0]), seen, rank=2).save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match="its initialisation .corda. has changed"):
        load(f"tiny-base+{tmp_path}")


def test_a_half_precision_base_is_rounded_once(tiny, seen):
    """W_res in bfloat16: W_res + s B A is W to the rounding of W_res, 2**-8 of its size; A and B stay float32."""
    pytest.importorskip("peft")
    half = copy.deepcopy(tiny[0]).bfloat16()
    tuned = corda(copy.deepcopy(half), seen, rank=6)
    for name, module in projections(half).items():
        layer = tuned.get_base_model().get_submodule(name)
        a, b, rest = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.get_base_layer().weight
        assert a.dtype == b.dtype == torch.float32 and rest.dtype == torch.bfloat16
        assert ((rest.float() + b @ a - module.weight.float()).abs() <= 2**-8 * rest.float().abs() + 1e-6).all()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"mode": "both"}, "no mode 'both'"),
        ({"rank": 97}, r"q_proj' \(96 x 96\) has no 97 components"),
        ({"rank": 0}, "a rank of 1 or more, and not 0"),
        ({"alpha": 0.0}, "alpha is above 0"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_changes(tiny, seen, change, told):
    model = copy.deepcopy(tiny[0])
    with pytest.raises(SurgeryError, match=told):
        corda(model, seen, **({"rank": 4} | change))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny[0].parameters(), strict=True))
    assert not any(hasattr(m, "lora_A") for m in model.modules())


def test_covariances_of_another_model_and_of_nothing_are_refused(tiny, seen):
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(SurgeryError, match=r"is \(5, 5\), and the layer reads 96"):
        corda(copy.deepcopy(tiny[0]), {name: torch.eye(5)}, rank=2)
    with pytest.raises(SurgeryError, match="no parameter 'model.layers.9"):
        corda(copy.deepcopy(tiny[0]), {"model.layers.9.self_attn.q_proj": torch.eye(96)}, rank=2)
    tied = copy.deepcopy(tiny[0])
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SurgeryError, match="share a weight"):
        corda(tied, seen, rank=2)
    with pytest.raises(SurgeryError, match=f"'{name}': A covariance is 0"):
        corda(copy.deepcopy(tiny[0]), {name: torch.zeros(96, 96)}, rank=2)


# ---- LoRA


def test_lora_begins_as_the_model_and_depends_on_its_seed_alone(tiny):
    pytest.importorskip("peft")
    model, tokenizer = tiny
    drawn = torch.random.get_rng_state()
    one, two, other = (lora(copy.deepcopy(model), rank=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(logits(one, tokenizer), logits(model, tokenizer))
    pairs = [(a, b, c) for a, b, c in zip(*(m.parameters() for m in (one, two, other)), strict=True) if a.requires_grad]
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)
    with pytest.raises(SurgeryError, match="has adapters already"):
        lora(one, rank=3)
    with pytest.raises(SurgeryError, match="alpha is above 0, and not -1"):
        lora(copy.deepcopy(model), rank=3, alpha=-1)
    with pytest.raises(SurgeryError, match="has adapters already"):
        covariances(one, [encode(tokenizer, TEXTS)])


def test_sizes_are_what_peft_makes_and_the_nearest_rank_is_found(tiny):
    """r (in + out) each: 4 layers of 4 x (96 + 96) + 3 x (96 + 256)."""
    pytest.importorskip("peft")
    model = tiny[0]
    one = 4 * (4 * 192 + 3 * 352)
    assert lora_size(model, 1) == one and lora_size(model, 3, ["attention"]) == 3 * 4 * 4 * 192
    tuned = lora(copy.deepcopy(model), rank=3)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == 3 * one
    assert [lora_rank_for(model, int(one * x)) for x in (0.5, 1.4, 1.6, 8)] == [1, 1, 2, 8]
    with pytest.raises(SurgeryError, match=f"rank 1 has {one:,} numbers, and 100 were asked for"):
        lora_rank_for(model, 100)


def test_a_plain_lora_is_exported_as_it_is(tiny, tmp_path):
    """The same bits as PEFT's own file."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    tuned = nudged(lora(copy.deepcopy(tiny[0]), rank=3, alpha=6))
    assert not changes_base(tuned)
    tuned.save_pretrained(tmp_path / "theirs")
    export(tuned, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    with torch.no_grad():
        next(p for p in tuned.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(SurgeryError, match="can't be merged"):
        merged(tuned)


def test_what_a_plain_lora_can_not_hold_is_not_exported(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(SurgeryError, match="this model has none"):
        export(copy.deepcopy(tiny[0]), tmp_path / "out")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(SurgeryError, match="more than a plain LoRA .use_dora."):
        export(peft.get_peft_model(copy.deepcopy(tiny[0]), config), tmp_path / "out")


# ---- in the engine


def by_letters(prompts, completions, **columns):
    """A reward that differs within groups."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


@pytest.mark.parametrize("objective", ["sft", "grpo"])
@pytest.mark.parametrize("kind", ["lora", "corda"])
def test_the_engine_trains_them_as_any_model(tiny, seen, objective, kind):
    """Only A and B move, the base keeps its bits, and two runs are the same run."""
    pytest.importorskip("peft")
    from surgery.training import train

    words = {"data": "chain", "steps": 2, "batch": {"rows": 6}, "optimizer": {"lr": 1e-3}, "objective": objective}
    if objective == "grpo":
        rollouts = {"prompts": 2, "group": 3, "max_new_tokens": 6, "temperature": 1.5}
        words |= {"objective": {"grpo": {"beta": 0.05}}, "rollouts": rollouts, "reward": by_letters}
    ends = []
    for _ in range(2):
        model = copy.deepcopy(tiny[0])
        tuned = lora(model, rank=2) if kind == "lora" else corda(model, seen, rank=2)
        before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
        run = train(tuned, tiny[1], **words)
        assert run.model is tuned and run.last["grad_norm"] > 0
        moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
        assert moved and moved <= {n for n, p in tuned.named_parameters() if p.requires_grad}
        assert all("lora_" in n for n in moved)
        ends.append(logits(tuned, tiny[1]))
    assert torch.equal(*ends)


# ---- parity


@pytest.mark.peers
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_parity_with_peft(tiny, mode, monkeypatch):
    """Their covariances, one text at a time, in our decomposition: W_res to 1e-5, A and B to 1e-4 of the largest.

    By `corda` itself, which rounds on another scale, to ten times that: float32 singular vectors lie close.

    Theirs divide each text by |max(x)|, not max |x|: with mostly negative inputs that is a small number, and the text
    counts for more. The scale of what `corda` is given cancels in B A; A and B trade it, by its square root.
    """
    if "attr" not in sys.modules:  # PEFT imports a package here that it does not depend on
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = tiny[0]
    texts = torch.randint(3, 45, (24, 40), generator=torch.Generator().manual_seed(0))
    batches = [encode(None, [text]) for text in texts]
    name = "model.layers.1.self_attn.v_proj"
    rows = [rows_read(model, name, batch) for batch in batches]
    covariance = sum(x.T @ x for x in (x / x.max().abs() for x in rows)) / len(rows)

    theirs = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[name], init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode)
    )
    preprocess_corda(theirs, config, run_model=lambda: [theirs(b.ids) for b in batches])
    layer = peft.get_peft_model(theirs, config).get_base_model().get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    weight = model.get_submodule(name).weight.detach()
    ours = decompose(weight, *damped(covariance)[:2], 4, mode, 2.0)
    assert (weight - 2.0 * ours[1] @ ours[0] - layer.get_base_layer().weight).abs().max() <= 1e-5
    whole = corda(copy.deepcopy(model), {name: covariance}, rank=4, mode=mode, alpha=8).get_base_model()
    mine, size = whole.get_submodule(name), covariance.diagonal().mean().sqrt()
    assert (mine.get_base_layer().weight - layer.get_base_layer().weight).abs().max() <= 1e-4
    for part, other, given in zip("AB", (a, b), ours, strict=True):
        assert (given - other).abs().max() <= 1e-4 * other.abs().max()
        found = getattr(mine, f"lora_{part}")["default"].weight * (size if part == "B" else 1 / size)
        assert (found.abs() - other.abs()).abs().max() <= 1e-3 * other.abs().max()
