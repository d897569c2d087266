"""Selections by scores against their equations; what is looked at is left as it was; files and sentences.

Where the traps of the published codes are tested:

| trap | test |
|---|---|
| LIFT: scripts take the K smallest | test_selection_lift: the direction of the released scripts |
| LIFT: the command line's default is a random mask | test_selection_lift: the usual mask is lift's |
| LIFT: a randomised SVD gives other masks | test_selection_lift: on SmolLM2 |
| LIFT: a late number's first step is 3.2 lr under AdamW's betas | test_optimizer: a late number begins gently |
| LIFT: the dense gradient is overwritten with the update | here: gradients can be looked at before and after a step |
| LIFT: state is saved with dense masks, on the CPU | test_optimizer: state is small; going on from a saved state |
| HFT: GQA, fused projections, tied embeddings, experts | test_selection_half |
| SaRA: the first forward sees abs(P) | test_selection_sara: before the first step |
| SaRA: re-selection draws from all small numbers | test_selection_sara: the next selection |
| SaRA: weight decay acts on what is chosen by default | here: nothing decays unless asked |
| SaRA: the nuclear norm moves nothing | test_nuclear |
| LT-SFT: ties can exceed the budget | test_selection_budget: a global choice |
| LT-SFT: the threshold is sought in a list of all differences | test_selection_budget: holds few candidates |
| LT-SFT: frozen numbers decay | test_optimizer: twenty steps, with weight decay |
| LT-SFT: its files count positions with the first dimension fastest | test_delta_peers |
| S2FT: weights change places; grouped queries fail | test_selection_structured |
"""

import copy

import pytest
import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.models import load
from surgery.tuning import SELECTORS, Selection, SparseAdamW, select
from surgery.tuning.selection import Slice

torch.set_num_threads(1)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=40, tie_word_embeddings=True)
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=32)).eval()


def batches(n=3, rows=2):
    g = torch.Generator().manual_seed(0)
    found = [torch.randint(0, 40, (rows, 9), generator=g) for _ in range(n)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def gradients(model, data):
    """Of each batch, by name, the plain way."""
    model, found = copy.deepcopy(model), []
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


def top(scores, k):
    return set(scores.flatten().topk(k).indices.tolist())


def same(chosen, scores, density=0.05):
    """Whether each tensor's choice is that of its highest scores."""
    assert set(chosen) == {n for n in scores if "proj" in n or "c_" in n}
    for name in chosen:
        k = round(density * scores[name].numel())
        assert set(chosen.flat(name).tolist()) == top(scores[name], k), name


def equations(model, data):
    steps = gradients(model, data)
    total = {n: sum(step[n] for step in steps) for n in steps[0]}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {
        "magnitude": {n: w.abs() for n, w in weights.items()},
        "gradient": {n: g.abs() for n, g in total.items()},
        "snip": {n: (g * weights[n]).abs() for n, g in total.items()},
        "fisher": {n: sum(step[n] ** 2 for step in steps) for n in total},
    }


@pytest.mark.parametrize("method", ["magnitude", "gradient", "snip", "fisher"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_scores_are_those_of_their_equations(make, method):
    model = make()
    scores = {n: s for n, s in equations(model, batches())[method].items() if s.dim() == 2}
    same(select(model, method, density=0.05, batches=batches()), scores)


def test_of_all_tensors_together_they_compete_with_each_other():
    model = llama()
    scores = {n: s for n, s in equations(model, batches())["fisher"].items() if "proj" in n}
    chosen = select(model, "fisher", density=0.05, scope="global", batches=batches())
    everything = torch.cat([s.flatten() for s in scores.values()])
    limit = everything.topk(round(0.05 * everything.numel())).values.min()
    for name, score in scores.items():
        assert set(chosen.flat(name).tolist()) == set((score.flatten() >= limit).nonzero().view(-1).tolist())


def test_the_largest_and_the_smallest_are_both_to_be_had():
    model = llama()
    small = select(model, "magnitude", density=0.05, direction="smallest")
    same(small, {n: -p.detach().abs() for n, p in model.named_parameters() if p.dim() == 2})
    assert small.overlap(select(model, "magnitude", density=0.05)) == 0


def test_movement_is_summed_along_gradient_descent():
    model, scores = llama(), {}
    moving = copy.deepcopy(model)
    names = [n for n, p in moving.named_parameters() if "proj" in n]
    for batch in batches():
        moving.zero_grad()
        moving(**batch).loss.backward()
        with torch.no_grad():
            for n in names:
                p = moving.get_parameter(n)
                scores[n] = scores.get(n, 0) - p.grad * p
                p -= 0.5 * p.grad
    same(select(model, "movement", density=0.05, lr=0.5, batches=batches()), scores)
    still = {n: -sum(step[n] for step in gradients(model, batches())) * model.get_parameter(n).detach() for n in names}
    assert any(top(still[n], 50) != top(scores[n], 50) for n in names)  # the way matters


@pytest.mark.parametrize("make", [llama, gpt2])
def test_wanda_compares_what_feeds_one_output(make):
    """abs(W) norm(X), the highest of each output's inputs; GPT-2 keeps its weights the other way round."""
    model, inputs = make(), {}

    def hook(name):
        return lambda module, args: inputs.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

    probe = copy.deepcopy(model)
    for name, module in probe.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and "head" not in name:
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    for batch in batches():
        probe(**batch)
    chosen = select(model, "wanda", density=0.25, batches=batches())
    assert set(chosen) == set(inputs)
    for name, mask in chosen.masks().items():
        weight = model.get_parameter(name).detach()
        weight, mask = (weight.T, mask.T) if make is gpt2 else (weight, mask)
        scores = weight.abs() * torch.cat(inputs[name]).norm(dim=0)
        k = round(0.25 * weight.shape[1])
        assert torch.equal(mask.sum(1), torch.full((len(mask),), k))
        for row, chosen_row in zip(scores, mask, strict=True):
            assert set(chosen_row.nonzero().view(-1).tolist()) == top(row, k)


def test_random_numbers_depend_on_the_seed_and_the_name_alone():
    model = llama()
    one, again = (select(model, "random", density=0.1, seed=1) for _ in range(2))
    assert one.overlap(again) == 1 and one.overlap(select(model, "random", density=0.1, seed=2)) < 0.2
    name = "model.layers.1.mlp.up_proj.weight"
    alone = select(model, "random", density=0.1, seed=1, modules=[name])
    assert torch.equal(alone.flat(name), one.flat(name))
    together = select(model, "random", density=0.1, scope="global")
    shares = [together.counted(n) / model.get_parameter(n).numel() for n in together]
    assert len(shares) == 14 and max(shares) < 0.2 and together.count == round(0.1 * together.total)


def test_a_siblings_delta_from_a_name_a_folder_and_a_model():
    model, _ = load("tiny-base")
    sibling, _ = load("tiny-chain")
    delta = {
        n: (q - p).detach().abs() for (n, p), q in zip(model.named_parameters(), sibling.parameters(), strict=True)
    }
    everything = torch.cat([d.flatten() for n, d in delta.items() if "proj" in n])
    limit = everything.topk(4424).values.min()
    by_name = select(model, "delta", sibling="tiny-chain", density=0.01)
    assert by_name.count == 4424 and everything.ge(limit).sum() >= 4424
    assert all(delta[n].flatten()[by_name.flat(n)].min() >= limit for n in by_name)
    from surgery import zoo

    for other in (zoo.get("tiny-chain"), str(zoo.get("tiny-chain")), sibling, sibling.state_dict()):
        found = select(model, "delta", sibling=other, density=0.01)
        assert found.count == 4424 and found.overlap(by_name) == 1
    assert torch.equal(model.model.norm.weight, load("tiny-base")[0].model.norm.weight)


ASKING = ["gradient", "snip", "fisher", "movement", "wanda"]


def snapshot(model):
    return (
        {n: v.clone() for n, v in model.state_dict().items()},
        [(n, p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()],
        [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        [list(getattr(p, "_post_accumulate_grad_hooks", None) or {}) for p in model.parameters()],
    )


def unchanged(before, after):
    assert all(torch.equal(v, after[0][n]) for n, v in before[0].items())
    for (n, flag, grad), (_, now, gradient) in zip(before[1], after[1], strict=True):
        assert flag == now and (grad is gradient is None or torch.equal(grad, gradient)), n
    assert before[2:] == after[2:]


def in_use():
    """A model in the middle of something: some flags off, a gradient that waits, a mode of its own."""
    model = llama()
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" not in name)
    model(**batches(1)[0]).loss.backward()
    model.model.layers[0].eval()
    return model


@pytest.mark.parametrize("method", ASKING)
def test_what_is_looked_at_is_left_as_it_was(method):
    model = in_use()
    before = snapshot(model)
    select(model, method, density=0.05, batches=batches())
    unchanged(before, snapshot(model))
    broken = [*batches(2), {"input_ids": torch.tensor([[99]]), "labels": torch.tensor([[1]])}]
    with pytest.raises(IndexError):
        select(model, method, density=0.05, batches=broken)
    unchanged(before, snapshot(model))


def test_bfloat16_weights_move_along_and_come_back_bit_for_bit():
    model = llama().bfloat16()
    before = snapshot(model)
    chosen = select(model, "movement", density=0.05, lr=0.1, batches=batches())
    unchanged(before, snapshot(model))
    assert chosen.count == sum(round(0.05 * p.numel()) for n, p in model.named_parameters() if "proj" in n)


@pytest.mark.parametrize("method", ASKING)
def test_beside_a_running_optimizer_the_choice_is_the_same_and_the_optimizer_takes_no_notice(method):
    """Its hooks rest: gradients that are looked at are not gathered, and frozen parameters have gradients again."""
    model = llama()
    expected = select(model, method, density=0.05, batches=batches())
    optimizer = SparseAdamW(model, select(model, "magnitude", density=0.05, modules=["mlp"]))
    model(**batches(1)[0]).loss.backward()
    gathered = optimizer.flat.grad.clone()
    before = snapshot(model)
    chosen = select(model, method, density=0.05, batches=batches())
    unchanged(before, snapshot(model))
    assert chosen.overlap(expected) == 1 and torch.equal(optimizer.flat.grad, gathered)
    optimizer.step()
    optimizer.reselect(chosen)
    model(**batches(1)[0]).loss.backward()
    optimizer.step()


def test_gradients_can_be_looked_at_before_and_after_a_step():
    """LIFT's released optimizer writes the update over the gradient."""
    model = llama()
    optimizer = SparseAdamW(model, select(model, "magnitude", density=0.05), lr=1e-3)
    (expected,) = gradients(model, batches(1))
    model(**batches(1)[0]).loss.backward()
    for _ in range(2):
        for name in optimizer.selection:
            right = expected[name].flatten()[optimizer.selection.flat(name)]
            torch.testing.assert_close(optimizer.gradient_of(name), right, rtol=1e-6, atol=1e-8)
        optimizer.step()
    optimizer.zero_grad()
    assert optimizer.gradient_of(name) is None


def test_nothing_decays_unless_asked():
    """SaRA's optimizer decays what is chosen by 1e-2, LT-SFT's dense one what is not, where asked at all."""
    model = llama()
    optimizer = SparseAdamW(model, select(model, "sara", density=0.1))
    assert optimizer.param_groups[0]["weight_decay"] == 0
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    (model.model.norm.weight.sum() + sum(0 * p.sum() for p in model.parameters())).backward()
    optimizer.step()
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_numbers_that_no_data_reach_score_zero_and_come_first_by_position():
    """The head of a loss on the hidden states alone has no gradients: the choice is still exactly as many."""
    model = llama()
    chosen = select(model, "fisher", density=0.1, batches=batches(), loss=lambda b: model.model.layers[0](
        model.model.embed_tokens(b["input_ids"]), position_embeddings=model.model.rotary_emb(
            model.model.embed_tokens(b["input_ids"]), torch.arange(9)[None])).float().square().sum())  # fmt: skip
    name = "model.layers.1.mlp.up_proj.weight"
    assert chosen.flat(name).tolist() == list(range(154))


@pytest.mark.parametrize("method", ["bias", "norm", "all"])
def test_whole_parameters_by_what_they_do(method):
    model = gpt2()
    chosen = select(model, method)
    names = {n for n, _ in model.named_parameters()}
    expected = {
        "bias": {n for n in names if n.endswith("bias")},
        "norm": {n for n in names if ".ln_" in n},
        "all": names,
    }
    assert set(chosen) == expected[method] and chosen.whole
    assert chosen.total == sum(p.numel() for p in model.parameters())
    if method == "all":
        assert chosen.density == 1 and select(model, "all", modules=["mlp"]).count < chosen.count
    with pytest.raises(SurgeryError, match=f"'{method}' takes no budget"):
        select(model, method, density=0.5)


def test_modules_are_groups_kinds_or_names_and_tied_weights_count_once():
    model = llama()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert set(select(model, "magnitude", density=0.1, modules=[name])) == {name}
    kinds = select(model, "magnitude", density=0.1, modules=["q", "down"])
    assert {n.split(".")[-2] for n in kinds} == {"q_proj", "down_proj"}
    assert len(select(model, "magnitude", density=0.1, modules="attention").places) == 8
    tied = select(model, "magnitude", density=0.1, modules=["embedding", "head"])
    assert set(tied) == {"model.embed_tokens.weight"} and tied.total == 40 * 32


def experts():
    """A layer of experts in one tensor each, with biases of two dimensions."""
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.Module()})})
    held = block["mlp"]["experts"]
    held.down_proj, held.down_proj_bias = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 8))
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def test_biases_are_no_matrices_whatever_their_dimensions():
    chosen = select(experts(), "magnitude", density=0.5)
    assert set(chosen) == {"layers.0.mlp.experts.down_proj"} and chosen.count == 72
    assert set(select(experts(), "bias")) == {"layers.0.mlp.experts.down_proj_bias"}


@pytest.mark.parametrize(
    "make, method, words, problem",
    [
        (llama, "fisher", {}, "looks at squares, and there are no data"),
        (llama, "wanda", {}, "looks at inputs, and there are no data"),
        (llama, "fisher", {"batches": []}, "looks at squares, and there are no data"),
        (llama, "wanda", {"batches": iter(())}, "looks at inputs, and there are no data"),
        (llama, "fisher", {"batches": ["a text"]}, "A batch is a str"),
        (llama, "delta", {}, "looks at a fine-tuned sibling of the model, and none is named"),
        (llama, "delta", {"sibling": "tiny-chain"}, r"The sibling's '.*' is \[96, 96\], the model's \[32, 32\]"),
        (llama, "delta", {"sibling": {"x": torch.ones(1)}}, "The sibling has no tensor '.*': it is of another family"),
        (llama, "delta", {"sibling": "tiny-chian"}, "tiny-chian"),
        (llama, "magnitude", {"modules": ["mpl"]}, "'mpl' is neither a kind or group of modules nor a parameter"),
        (llama, "magnitude", {"modules": ["router"]}, "Nothing in LlamaForCausalLM is router"),
        (gpt2, "magnitude", {"modules": ["q"]}, "no projection 'q' of its own: it is part of '.*c_attn"),
        (llama, "wanda", {"modules": ["embedding"], "batches": batches()}, "The inputs of '.*embed.*' are not known"),
        (llama, "gradient", {"batches": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]}, "gives no loss"),
        (llama, "gradient", {"batches": batches(), "loss": lambda b: None}, "The loss of a batch is no number"),
        (llama, "fisher", {"batches": batches(), "loss": lambda b: torch.ones(())}, "The loss of a batch is no number"),
        (experts, "wanda", {"batches": [{}], "loss": lambda b: None}, "Experts in one tensor .* their own inputs"),
        (llama, "magnitude", {"direction": "sideways"}, "There is no direction 'sideways'"),
        (llama, "magnitude", {"seed": 3}, "The selection 'magnitude' has no option 'seed'"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(make, method, words, problem):
    with pytest.raises(SurgeryError, match=problem):
        select(make(), method, **({"density": 0.1} | words))


def test_gradients_that_are_not_finite_name_their_tensor_and_leave_the_model():
    model = llama()
    before = snapshot(model)
    for method in ("gradient", "movement"):
        with pytest.raises(SurgeryError, match="The gradient of '.*' is not finite"):
            select(model, method, density=0.1, batches=batches(), loss=lambda b: model(**b).loss * float("inf"))
        unchanged(before, snapshot(model))


def test_quantised_weights_are_refused():
    model = llama()
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SurgeryError, match="q_proj.weight' is quantised .*torch.int8"):
        select(model, "magnitude", density=0.1)
    assert select(model, "magnitude", density=0.1, modules=["mlp"]).count


# ---- what a Selection is


def test_counts_densities_masks_and_overlap():
    places = {"a": torch.tensor([1, 5], dtype=torch.int32), "b": None, "c": Slice(1, torch.tensor([0, 2]))}
    chosen = Selection(places, {"a": (2, 3), "b": (4,), "c": (2, 3)}, total=32)
    assert (chosen.count, chosen.density, chosen.whole, "a" in chosen, "d" in chosen) == (
        10,
        10 / 32,
        False,
        True,
        False,
    )
    masks = chosen.masks()
    assert masks["a"].tolist() == [[False, True, False], [False, False, True]] and bool(masks["b"].all())
    assert masks["c"].tolist() == [[True, False, True]] * 2
    assert chosen.flat("c").tolist() == [0, 2, 3, 5] and chosen.flat("d").tolist() == []
    again = Selection.of_masks(masks)
    assert again.places["b"] is None and again.count == 10 and again.overlap(chosen) == chosen.overlap(again) == 1
    other = Selection.of_masks({"a": torch.tensor([[True, True, False], [False] * 3]), "e": torch.ones(2) > 0})
    assert chosen.overlap(other) == 1 / 4
    both = chosen.both(other)
    assert both.count == 10 + 4 - 1 and both.flat("a").tolist() == [0, 1, 5] and both.places["e"] is None
    assert "10 of 32 numbers (31.25%) in 3 tensors" in repr(chosen)
    assert Selection.of_masks({"a": torch.zeros(3) > 0}).places == {}


def test_a_file_gives_back_what_was_saved(tmp_path):
    for name, chosen in {
        "lift": select(llama(), "lift", rank=4, density=0.1),
        "half": select(llama(), "half"),
        "s2ft": select(llama(), "s2ft", density=0.2),
        "sara": select(llama(), "sara", density=0.1),
    }.items():
        chosen.save(tmp_path / name)
        again = Selection.load(tmp_path / name)
        assert (again.method, again.total, again.notes, again.shapes) == (
            chosen.method, chosen.total, chosen.notes, chosen.shapes)  # fmt: skip
        for tensor, places in chosen.places.items():
            got = again.places[tensor]
            if isinstance(places, Slice):
                assert got.dim == places.dim and torch.equal(got.index, places.index)
            else:
                assert got is places is None or (got.dtype == torch.int32 and torch.equal(got, places))
        SparseAdamW(llama(), again)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(SurgeryError, match="already something at"):
        chosen.save(tmp_path / "lift")
    chosen.save(tmp_path / "lift", force=True)
    assert Selection.load(tmp_path / "lift").method == "sara"
    (tmp_path / "text").write_text("no safetensors file")
    with pytest.raises(SurgeryError, match="can't be read as a selection"):
        Selection.load(tmp_path / "text")
    with pytest.raises(SurgeryError, match="can't be read as a selection"):
        Selection.load(tmp_path / "nowhere")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(SurgeryError, match="holds no selection"):
        Selection.load(tmp_path / "other")


@pytest.mark.parametrize("method", sorted(SELECTORS))
def test_every_selection_trains_what_it_chose_and_nothing_else(method):
    """Two steps of each: numbers outside keep their bits, and some inside move."""
    model = llama()
    budget = {} if method in ("half", "bias", "norm", "all") else {"density": 0.1}
    more = {"modules": ["attention"]} if method == "all" else {"sibling": llama().double()} if method == "delta" else {}
    if method == "bias":
        model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
    chosen = select(model, method, batches=batches(), **budget, **more)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = SparseAdamW(model, chosen, lr=1e-2, weight_decay=0.1)
    for batch in batches(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = chosen.masks()
    moved = 0
    for name, p in model.named_parameters():
        outside = ~masks[name] if name in masks else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[outside], start[name][outside]), name
        moved += int((p != start[name]).sum())
    assert 0.5 * chosen.count < moved <= chosen.count
    if budget:
        assert chosen.density == pytest.approx(0.1, abs=0.01)
