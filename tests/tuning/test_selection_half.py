"""HFT: half of every category, drawn anew in every round, by whole tensors."""

from collections import Counter

import pytest
import torch

from surgery.anatomy.names import group_of, kind_of, layer_of
from surgery.errors import SurgeryError
from surgery.tuning import SparseAdamW, select
from surgery.tuning.selection import Round
from surgery.tuning.selection.half import select_half

torch.set_num_threads(1)


def llama(layers=6, heads=4, groups=4, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=56, num_hidden_layers=layers, num_attention_heads=heads,
                    num_key_value_heads=groups, vocab_size=40, **more)
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=40, n_positions=32))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
                      num_key_value_heads=2, num_local_experts=3, vocab_size=40)
    )  # fmt: skip


def inside(chosen):
    """How many tensors of each layer and group move."""
    return Counter((layer_of(n), group_of(n)) for n in chosen if layer_of(n) is not None)


@pytest.mark.parametrize("seed", range(5))
def test_exactly_half_of_every_category_moves(seed):
    model = llama()
    chosen = select(model, "half", seed=seed)
    counts = inside(chosen)
    assert chosen.whole and all(counts[layer, "attention"] == 2 for layer in range(6))
    assert all(counts[layer, "norm"] == 1 for layer in range(6))
    assert [counts[layer, "mlp"] for layer in range(6)] == [1, 2, 1, 2, 1, 2]
    names = [n for n, _ in model.named_parameters() if layer_of(n) is not None]
    assert sum(counts.values()) == len(names) // 2 == 27
    for name, places in chosen.places.items():
        assert places is None and chosen.counted(name) == model.get_parameter(name).numel()


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
@pytest.mark.parametrize("level", ["category", "model"])
def test_the_share_stays_within_one_tensor_of_half(layers, level):
    model = llama(layers)
    for seed in range(4):
        chosen = select(model, "half", level=level, seed=seed, outside="freeze")
        assert abs(len(chosen.places) - layers * 9 / 2) <= 1


def test_every_kind_has_its_turn():
    """Over many seeds each projection moves in half of the draws: 5 standard errors."""
    counts = Counter(kind_of(n) for seed in range(60) for n in select(llama(2), "half", seed=seed, outside="freeze"))
    for kind in ("q", "k", "v", "o", "gate", "up", "down"):
        assert abs(counts[kind] / 120 - 0.5) < 5 * 0.5 / 120**0.5


def test_a_seed_gives_one_half_and_every_round_another():
    model = llama()
    first, again = select(model, "half", seed=3), select(model, "half", seed=3)
    assert first.places.keys() == again.places.keys() == select_half(model, seed=3)
    rounds = [frozenset(select(model, "half", seed=3, turn=Round(i, first))) for i in range(4)]
    assert rounds[0] == set(first) and len(set(rounds)) == 4
    assert len({frozenset(select(model, "half", seed=s)) for s in range(4)}) == 4
    assert all(inside(chosen)[0, "attention"] == 2 for chosen in rounds)
    torch.manual_seed(1)
    assert select_half(model, seed=3) == set(first)  # no seed of torch has a part in it


def test_the_layer_level_draws_whole_layers():
    chosen = select(llama(), "half", level="layer", outside="freeze")
    layers = Counter(map(layer_of, chosen))
    assert len(layers) == 3 and set(layers.values()) == {9}


def test_the_model_level_draws_any_tensors_of_the_layers():
    draws = [inside(select(llama(), "half", level="model", seed=s, outside="freeze")) for s in range(3)]
    assert all(sum(d.values()) == 27 for d in draws)
    assert any(d[layer, "attention"] != 2 for d in draws for layer in range(6))


def test_what_is_outside_the_layers_trains_unless_frozen():
    """As in the paper: embeddings and head are trained."""
    outside = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert outside <= set(select(llama(), "half"))
    assert not outside & set(select(llama(), "half", outside="freeze"))


def test_a_tied_embedding_is_one_member():
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chosen = select(model, "half")
    assert "model.embed_tokens.weight" in chosen and "lm_head.weight" not in chosen
    SparseAdamW(model, chosen)


def test_elements_are_counted_where_asked_since_grouped_keys_are_small():
    """q and o have 1,024 numbers here, k and v 256: by tensors the share of numbers is anything from 1 to 4 in 5."""

    def shares(balance):
        found = []
        for seed in range(12):
            masks = select(
                llama(8, groups=1), "half", seed=seed, outside="freeze", balance=balance, modules=["attention"]
            )
            found.append(masks.density)
        return torch.tensor(found)

    assert (shares("elements") - 0.5).abs().max() < 0.05
    assert (shares("elements") - 0.5).abs().mean() < (shares("tensors") - 0.5).abs().mean()


def test_a_fused_projection_is_one_member_with_its_bias():
    model = gpt2()
    chosen = set(select(model, "half", seed=1, outside="freeze"))
    modules = {n.rpartition(".")[0] for n, _ in model.named_parameters() if layer_of(n) is not None}
    for module in modules:
        assert (f"{module}.weight" in chosen) == (f"{module}.bias" in chosen)
    moving = Counter((layer_of(n), group_of(n)) for n in chosen if n.endswith("weight"))
    for layer in range(4):
        assert moving[layer, "attention"] == moving[layer, "mlp"] == moving[layer, "norm"] == 1  # of qkv and o, ...


def test_experts_kept_in_one_tensor_are_drawn_projection_by_projection():
    """Both tensors of all experts are parameters of one module, and two members all the same."""
    counts = inside(select(mixtral(), "half", outside="freeze"))
    assert all(counts[layer, "attention"] == 2 and counts[layer, "mlp"] == 1 for layer in range(4))
    assert abs(sum(counts.values()) - sum(layer_of(n) is not None for n, _ in mixtral().named_parameters()) / 2) <= 1


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6, 0.75])
def test_another_ratio_is_met_within_a_tensor(ratio):
    chosen = select(llama(8), "half", ratio=ratio, outside="freeze")
    assert abs(len(chosen.places) - ratio * 72) <= 1


def test_frozen_tensors_keep_their_bits_and_get_no_gradient():
    model = llama(2)
    start = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = SparseAdamW(model, select(model, "half"), lr=1e-2)
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in optimizer.selection) != torch.equal(p, start[name])


def test_wrong_options_get_a_sentence():
    for words, problem in (
        ({"level": "block"}, "HFT has no level 'block'"),
        ({"outside": "maybe"}, "HFT has no value of outside 'maybe'"),
        ({"balance": "bytes"}, "HFT has no balance 'bytes'"),
        ({"ratio": 1.0}, "A ratio of 1 leaves nothing to draw"),
        ({"ratio": 0.0}, "A ratio of 0 leaves nothing to draw"),
        ({"density": 0.1}, "takes no budget"),
        ({"levels": "layer"}, "no option 'levels'"),
    ):
        with pytest.raises(SurgeryError, match=problem):
            select(llama(1), "half", **words)
