"""S2FT: channels and heads whose rows and columns move together, and whose gradients alone are computed."""

import copy
import warnings

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.models import load
from surgery.tuning import SparseAdamW, select
from surgery.tuning.selection import Slice

torch.set_num_threads(1)
COUPLED = ["v", "o", "gate", "up", "down"]


def llama(groups=4, layers=3):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=56, num_hidden_layers=layers, num_attention_heads=4,
                    num_key_value_heads=groups, vocab_size=40)
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=32,
                                      resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))  # fmt: skip


def ids(seed=0, rows=3):
    return torch.randint(0, 40, (rows, 10), generator=torch.Generator().manual_seed(seed))


def index(chosen, name):
    return chosen.places[name].index.tolist() if name in chosen else []


@pytest.mark.parametrize("by", ["random", "largest", "smallest"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_gate_up_and_down_share_channels_and_v_and_o_share_heads(by, scope):
    chosen = select(llama(), "s2ft", density=0.3, by=by, scope=scope, modules=COUPLED)
    for layer in range(3):
        at = f"model.layers.{layer}."
        channels = index(chosen, f"{at}mlp.down_proj.weight")
        assert channels == index(chosen, f"{at}mlp.gate_proj.weight") == index(chosen, f"{at}mlp.up_proj.weight")
        heads = index(chosen, f"{at}self_attn.o_proj.weight")
        assert heads == index(chosen, f"{at}self_attn.v_proj.weight") == sorted(heads)
        assert all(heads[i : i + 8] == list(range(heads[i], heads[i] + 8)) and heads[i] % 8 == 0
                   for i in range(0, len(heads), 8))  # fmt: skip
    dims = {n.split(".")[-2]: places.dim for n, places in chosen.places.items()}
    assert dims == {"gate_proj": 0, "up_proj": 0, "v_proj": 0, "down_proj": 1, "o_proj": 1}


def test_query_heads_of_one_key_head_go_together():
    """Two key heads for four query heads: rows 8-15 of v feed columns 16-31 of o."""
    chosen = select(llama(groups=2), "s2ft", density=0.5, modules=["v", "o"], scope="tensor")
    for layer in range(3):
        rows = index(chosen, f"model.layers.{layer}.self_attn.v_proj.weight")
        columns = index(chosen, f"model.layers.{layer}.self_attn.o_proj.weight")
        assert len(rows) == 8 and len(columns) == 16
        assert columns == list(range(2 * rows[0], 2 * rows[0] + 16))
    alone = select(llama(groups=2), "s2ft", density=0.25, modules=["o"], scope="tensor")
    assert all(len(index(alone, n)) == 8 for n in alone)  # one query head at a time where v stays


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_budget_is_met_within_half_a_channel(density, scope):
    model, _ = load("tiny-base")
    chosen = select(model, "s2ft", density=density, scope=scope)
    assert abs(chosen.count - density * chosen.total) <= 96 / 2 + len(chosen.places)  # a column of down; rounding
    assert all(isinstance(places, Slice) for places in chosen.places.values())


def test_by_the_norm_of_their_weights():
    model = llama(layers=1)
    mlp = model.model.layers[0].mlp
    norms = sum(w.detach().square().sum(d) for w, d in ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1),
                                                        (mlp.down_proj.weight, 0)))  # fmt: skip
    for by, largest in (("largest", True), ("smallest", False)):
        chosen = select(model, "s2ft", density=10 / 56, by=by, modules=["gate", "up", "down"])
        assert index(chosen, "model.layers.0.mlp.up_proj.weight") == sorted(
            norms.topk(10, largest=largest).indices.tolist()
        )


def test_the_draw_depends_on_the_seed_alone_and_on_no_other_layer():
    model = llama()
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    one = select(model, "s2ft", density=0.2, modules=["down"], scope="tensor", seed=1)
    assert select(model, "s2ft", density=0.2, modules=["down"], scope="tensor", seed=1).overlap(one) == 1
    assert select(model, "s2ft", density=0.2, modules=["down"], scope="tensor", seed=2).overlap(one) < 0.6
    alone = select(model, "s2ft", density=0.2, modules=names[:1], scope="tensor", seed=1)
    assert index(alone, names[0]) == index(one, names[0])
    assert index(one, names[0]) != index(one, names[1])


def test_all_layers_compete_in_the_released_draw():
    counts = [len(places.index) for places in select(llama(), "s2ft", density=0.2, modules=["down"]).places.values()]
    assert sum(counts) == 34 and len(set(counts)) > 1  # 20 % of 3 x 56 channels, not the same number in each layer
    each = select(llama(), "s2ft", density=0.2, modules=["down"], scope="tensor")
    assert [len(places.index) for places in each.places.values()] == [11, 11, 12]


def gradients(model, chosen, *, autocast=False, checkpointing=None, steps=1):
    """What the optimizer gathers in `steps` backward passes, by parameter."""
    model.train()
    if checkpointing is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    optimizer = SparseAdamW(model, chosen)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids(step), labels=ids(step)).loss
        loss.backward()
    found = {n: optimizer.gradient_of(n).clone() for n in chosen}
    assert all(model.get_parameter(n).grad is None for n in chosen)
    optimizer.release()
    return found


def dense(model, autocast=False, steps=1):
    model = copy.deepcopy(model).train().requires_grad_(True)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids(step), labels=ids(step)).loss
        loss.backward()
    return {n: p.grad.flatten() for n, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_are_the_slices_of_the_dense_ones(make, autocast, checkpointing):
    """To 1e-6 of their size in float32, to bfloat16's rounding of a sum under autocast; over two micro-batches."""
    model = make()
    modules = COUPLED if make is llama else ["o", "up", "down"]
    chosen = select(model, "s2ft", density=0.3, modules=modules)
    expected = dense(model, autocast, steps=2)
    found = gradients(model, chosen, autocast=autocast, checkpointing=checkpointing, steps=2)
    for name, got in found.items():
        right = expected[name][chosen.flat(name)]
        assert (got - right).abs().max() <= (2e-2 if autocast else 1e-6) * max(1, float(right.abs().max()))
        assert right.abs().max() > 1e-4


def test_gpt2s_weights_are_kept_the_other_way_round():
    chosen = select(gpt2(), "s2ft", density=0.3, modules=["o", "up", "down"], by="largest")
    dims = {n.split(".", 3)[3]: (places.dim, chosen.shapes[n]) for n, places in chosen.places.items()}
    assert dims["mlp.c_fc.weight"] == (1, (32, 128)) and dims["mlp.c_proj.weight"] == (0, (128, 32))
    assert dims["attn.c_proj.weight"] == (0, (32, 32))
    assert index(chosen, "transformer.h.0.mlp.c_fc.weight") == index(chosen, "transformer.h.0.mlp.c_proj.weight")


def test_no_dense_gradient_is_made_and_nothing_else_moves():
    model = llama()
    start = copy.deepcopy(model.state_dict())
    chosen = select(model, "s2ft", density=0.2, modules=COUPLED)
    optimizer = SparseAdamW(model, chosen, lr=1e-2)
    made = []
    for name in chosen:
        model.get_parameter(name).register_post_accumulate_grad_hook(lambda p, name=name: made.append(name))
    before = model(ids(), labels=ids()).loss
    for _ in range(10):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids(), labels=ids()).loss < before - 0.05
    assert not made  # autograd makes no product for any of them
    masks = chosen.masks()
    for name, p in model.named_parameters():
        same = p.detach() == start[name]
        assert bool(same[~masks[name]].all() if name in masks else same.all())
    assert any((model.get_parameter(n) != start[n])[masks[n]].all() for n in masks)


def test_forward_is_the_same_with_hooks_and_after_their_release():
    model = llama()
    plain = model(ids()).logits
    optimizer = SparseAdamW(model, select(model, "s2ft", density=0.2))
    assert torch.equal(model(ids()).logits, plain)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, plain)
    optimizer.release()
    assert not any(m._forward_hooks for m in model.modules()) and torch.equal(model(ids()).logits, plain)


def test_a_copy_of_the_model_gives_its_gradients_to_nobody():
    """Trainers copy a model for a reference: hooks come along, and must not gather for the first one's optimizer."""
    model = llama()
    optimizer = SparseAdamW(model, select(model, "s2ft", density=0.2))
    other = copy.deepcopy(model).requires_grad_(True)
    other(ids(), labels=ids()).loss.backward()
    assert optimizer.flat.grad is None and all(p.grad is not None for p in other.parameters())


def test_what_has_no_rows_or_columns_of_its_own_gets_a_sentence():
    for make, words, problem in (
        (llama, {"modules": ["q"]}, r"q_proj.weight' \(q\) has no rows or columns that are heads or channels"),
        (llama, {"modules": ["embedding"]}, "has no rows or columns"),
        (gpt2, {"modules": ["v"]}, "no projection 'v' of its own: it is part of 'transformer.h.0.attn.c_attn"),
        (gpt2, {"modules": ["qkv"]}, "has no rows or columns"),
        (llama, {"scope": "row"}, "no scope 'row'"),
        (llama, {"by": "size"}, "S2FT does not choose by 'size'"),
        (llama, {"density": 1e-4}, "'s2ft' chose nothing"),
    ):
        with pytest.raises(SurgeryError, match=problem):
            select(make(), "s2ft", **({"density": 0.1} | words))


def test_experts_and_towers_are_blocks_of_their_own():
    """Channels of one expert are not those of another, nor layer 0 of an encoder that of a decoder."""
    from torch import nn

    def mlp():
        return nn.ModuleDict({"up_proj": nn.Linear(6, 10), "down_proj": nn.Linear(10, 6)})

    def stack(block):
        return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": block})])})

    encoder = stack(nn.ModuleDict({"experts": nn.ModuleList([mlp(), mlp()])}))
    model = nn.ModuleDict({"encoder": encoder, "decoder": stack(mlp())})
    chosen = select(model, "s2ft", density=0.5, modules=["up", "down"], scope="tensor")
    blocks = ["encoder.layers.0.mlp.experts.0", "encoder.layers.0.mlp.experts.1", "decoder.layers.0.mlp"]
    channels = [index(chosen, f"{at}.up_proj.weight") for at in blocks]
    assert channels == [index(chosen, f"{at}.down_proj.weight") for at in blocks]
    assert [len(c) for c in channels] == [5, 5, 5] and len({tuple(c) for c in channels}) == 3
