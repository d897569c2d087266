"""SparseAdamW: equal to dense AdamW with masked gradients, and every other number keeps its bits."""

import copy

import pytest
import torch
from torch import nn

from surgery.anatomy import group_of
from surgery.errors import SurgeryError
from surgery.models import load
from surgery.tuning import Selection, SparseAdamW, select, slices
from surgery.tuning.selection import Slice

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8


def net(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).to(dtype)


def data(steps=20):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 16, generator=g), torch.randn(64, 8, generator=g)) for _ in range(steps)]


def loss(model, x, y):
    return ((model(x.to(next(model.parameters()).dtype)).float() - y) ** 2).mean()


def random_masks(model, share=0.2, seed=3):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=g) < share for n, p in model.named_parameters()}


def dense(model, masks, batches, *, weight_decay=0.0, clip=None, accumulate=1):
    """AdamW on all weights with masked gradients; masked numbers are put back, where decay would move them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    start = copy.deepcopy(model.state_dict())
    for at in range(0, len(batches), accumulate):
        for x, y in batches[at : at + accumulate]:
            loss(model, x, y).backward()
        for n, p in model.named_parameters():
            p.grad *= masks[n]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(torch.where(masks[n], p, start[n]))
    return model


def sparse(model, selection, batches, *, accumulate=1, **settings):
    optimizer = SparseAdamW(model, selection, lr=LR, betas=BETAS, eps=EPS, **settings)
    for at in range(0, len(batches), accumulate):
        for x, y in batches[at : at + accumulate]:
            loss(model, x, y).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def dense_gradients(model):
    """The names of parameters whose dense gradient comes, as it comes."""
    made = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: made.append(name))
    return made


def furthest(a, b):
    return max(
        float((p.detach().float() - q.detach().float()).abs().max())
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"clip": 0.05}, {"weight_decay": 0.01, "clip": 0.1}])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("block", [0, 40, 1 << 18])
def test_twenty_steps_equal_dense_adamw_with_masked_gradients(monkeypatch, settings, accumulate, block):
    """By hooks on the parameters, and (`block`) by products of a few rows of a weight at a time."""
    monkeypatch.setattr(slices, "BLOCK", block)
    settings = settings | {"blocks": bool(block)}
    one, other = net(), net()
    masks, batches = random_masks(one), data(20 * accumulate)
    start = copy.deepcopy(one.state_dict())
    dense(other, masks, batches, accumulate=accumulate, **{k: v for k, v in settings.items() if k != "blocks"})
    sparse(one, Selection.of_masks(masks), batches, accumulate=accumulate, **settings)
    assert furthest(one, other) <= 1e-7
    for n, p in one.named_parameters():
        assert torch.equal(p[~masks[n]], start[n][~masks[n]])
        assert not torch.equal(p[masks[n]], start[n][masks[n]])


@pytest.mark.parametrize("autocast", [False, True])
def test_products_by_blocks_are_the_dense_gradients(monkeypatch, autocast):
    """Llama's and GPT-2's projections, under autocast and gradient checkpointing, tied weights by their own hook."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setattr(slices, "BLOCK", 500)
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=24, vocab_size=40, resid_pdrop=0, embd_pdrop=0,
                                     attn_pdrop=0))  # fmt: skip
    ids = torch.randint(3, 30, (3, 11), generator=torch.Generator().manual_seed(0))
    for model in (load("tiny-base", "float32")[0], gpt):
        model.train()
        chosen = select(model, "random", density=0.2, modules=["attention", "mlp", "embedding"])
        gradients = []
        for blocks in (False, True):
            optimizer, made = SparseAdamW(model, chosen, blocks=blocks), dense_gradients(model)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(ids, labels=ids).loss.backward()
            optimizer.settle()
            gradients.append(optimizer.flat.grad.clone())
            embeddings = {n for n in chosen if group_of(n) == "embedding"}
            assert set(made) == (embeddings if blocks else set(chosen))
            optimizer.release()
        scale = float(gradients[0].abs().max())
        assert float((gradients[0] - gradients[1]).abs().max()) <= (2e-2 if autocast else 1e-6) * scale
        assert not any(m._forward_hooks for m in model.modules())


def test_whole_parameters_and_slices_move_as_their_masks_do():
    batches = data()
    rows, columns = torch.tensor([1, 5, 30]), torch.tensor([0, 2, 31])
    places = {"0.weight": Slice(0, rows), "0.bias": None, "2.weight": Slice(1, columns)}
    shapes = {n: tuple(p.shape) for n, p in net().named_parameters() if n in places}
    sliced = Selection(places, shapes)
    masks = sliced.masks() | {"2.bias": torch.zeros(8, dtype=torch.bool)}
    assert int(masks["0.weight"].sum()) == 3 * 16 and int(masks["2.weight"].sum()) == 3 * 8
    one, two, other = net(), net(), net()
    optimizer = sparse(one, sliced, batches)
    sparse(two, Selection.of_masks(masks), batches)
    dense(other, masks, batches)
    assert furthest(one, other) <= 1e-7 and furthest(two, other) <= 1e-7
    made = dense_gradients(one)
    loss(one, *batches[0]).backward()
    assert made == ["0.bias"]  # the products for all of the weights are never made
    optimizer.release()
    assert all(p.requires_grad for p in one.parameters())
    before = copy.deepcopy(one.state_dict())
    loss(one, *batches[0]).backward()
    assert one[0].weight.grad is not None and all(torch.equal(v, before[n]) for n, v in one.state_dict().items())


@pytest.mark.parametrize("blocks", [False, True])
def test_what_else_a_weight_is_used_for_has_its_gradient(blocks):
    """A penalty on the weights themselves, a weight used by hand: not through the projection's forward."""
    model, other, (x, y) = net(), net(), data(1)[0]
    masks = random_masks(model)

    def whole(m):
        by_hand = torch.nn.functional.linear(x, m[0].weight).square().mean()
        return loss(m, x, y) + sum(p.square().sum() for p in m.parameters()) + by_hand

    optimizer = SparseAdamW(model, Selection.of_masks(masks), blocks=blocks)
    whole(model).backward()
    whole(other).backward()
    optimizer.settle()
    for name, p in other.named_parameters():
        torch.testing.assert_close(optimizer.gradient_of(name), p.grad[masks[name]], rtol=1e-5, atol=1e-7)


def test_a_forward_that_fails_leaves_its_weight_as_it_was():
    model = net()
    SparseAdamW(model, Selection.of_masks(random_masks(model)), blocks=True)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5))
    assert all(p.requires_grad for p in model.parameters())


def test_bfloat16_weights_move_by_steps_below_their_resolution():
    """lr 1e-5 is far below bfloat16's resolution of weights of 0.2: without float32 values nothing would move."""
    one, other = net(torch.bfloat16), net(torch.bfloat16).float()
    masks, batches = random_masks(one), data(100)
    optimizer = SparseAdamW(one, Selection.of_masks(masks), lr=1e-4)
    full = torch.optim.AdamW(other.parameters(), lr=1e-4, weight_decay=0)
    for x, y in batches:
        loss(one, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss(other, x, y).backward()
        for n, p in other.named_parameters():
            p.grad *= masks[n]
        full.step()
        full.zero_grad()
    moved = torch.cat(
        [
            (p.float() - q.float()).flatten()
            for p, q in zip(one.parameters(), net(torch.bfloat16).parameters(), strict=True)
        ]
    )
    assert (moved != 0).float().mean() > 0.1
    assert furthest(one, other) < 0.004  # a bfloat16 step near 0.25 is 0.001; gradients are rounded too
    master = optimizer.state[optimizer.flat]["master"]
    exact = torch.cat([p[masks[n]] for n, p in other.named_parameters()])
    assert (master - exact).abs().max() < 0.003
    held = torch.cat([p[masks[n]] for n, p in one.named_parameters()])
    assert torch.equal(held, master.bfloat16())


def test_state_is_small():
    model = net()
    optimizer = sparse(model, Selection.of_masks(random_masks(model)), data(1))
    assert optimizer.nbytes == 12 * optimizer.selection.count
    optimizer.reselect(Selection.of_masks(random_masks(model, seed=4)))
    assert optimizer.nbytes == 13 * optimizer.selection.count
    assert optimizer.flat.untyped_storage().nbytes() == 4  # a stand-in


@pytest.mark.parametrize("ages", ["entry", "optimizer"])
def test_moments_live_on_where_selections_meet(ages):
    """Against a dense optimizer with its own count of steps for every number, over three selections."""
    model, other, batches = net(), net(), data(30)
    masks = [random_masks(model, 0.3, seed) for seed in (1, 2, 3)]
    start = copy.deepcopy(model.state_dict())
    optimizer = SparseAdamW(model, Selection.of_masks(masks[0]), lr=LR, ages=ages)
    m = {n: torch.zeros_like(p) for n, p in other.named_parameters()}
    v, t = copy.deepcopy(m), copy.deepcopy(m)
    for i, (x, y) in enumerate(batches):
        now = masks[i // 10]
        if i % 10 == 0 and i:
            optimizer.reselect(Selection.of_masks(now))
            for n in m:
                for kept in (m, v, t):
                    kept[n] *= now[n]
        loss(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss(other, x, y).backward()
        with torch.no_grad():
            for n, p in other.named_parameters():
                g = p.grad * now[n]
                t[n] = (t[n] + 1) * now[n] if ages == "entry" else torch.full_like(t[n], i + 1)
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.999 * v[n] + 0.001 * g * g
                step = m[n] / (1 - 0.9 ** t[n]) / ((v[n] / (1 - 0.999 ** t[n])).sqrt() + EPS)
                p -= torch.where(now[n], LR * step, 0.0)
                p.grad = None
    assert furthest(model, other) <= 2e-6
    for n, p in model.named_parameters():
        untouched = ~(masks[0][n] | masks[1][n] | masks[2][n])
        assert torch.equal(p[untouched], start[n][untouched])
    assert len(optimizer.state[optimizer.flat]["births"]) == 3


def test_a_late_number_begins_gently_unless_the_published_count_is_asked_for():
    """With betas (0.9, 0.999) the released count makes the first step of a late number 3.2 lr; ours is lr."""

    def first(ages, betas):
        p = nn.Parameter(torch.zeros(2))
        model = nn.Module()
        model.w = p
        one, both = (Selection.of_masks({"w": torch.tensor(m)}) for m in ([True, False], [True, True]))
        optimizer = SparseAdamW(model, one, lr=1.0, betas=betas, ages=ages)
        for i in range(10_001):
            if i == 10_000:
                optimizer.reselect(both)
            p.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return -float(p.detach()[1])

    assert first("entry", (0.9, 0.999)) == pytest.approx(1, abs=1e-4)
    assert first("optimizer", (0.9, 0.999)) == pytest.approx(0.1 / 0.001**0.5, rel=1e-3)
    assert first("optimizer", (0.9, 0.95)) == pytest.approx(0.1 / 0.05**0.5, rel=1e-3)


def test_going_on_from_a_saved_state_is_bit_for_bit_whatever_the_order_of_the_selection():
    batches = data(20)
    straight = net()
    chosen = Selection.of_masks(random_masks(straight))
    sparse(straight, chosen, batches)
    broken = net()
    optimizer = sparse(broken, chosen, batches[:10])
    state = copy.deepcopy(optimizer.state_dict())
    again = net()
    again.load_state_dict(broken.state_dict())
    shuffled = Selection(dict(reversed(chosen.places.items())), chosen.shapes)
    for selection in (shuffled, Selection.of_masks(random_masks(again, seed=9))):
        again.load_state_dict(broken.state_dict())
        optimizer = SparseAdamW(again, selection, lr=1.0)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == LR
        for x, y in batches[10:]:
            loss(again, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert furthest(again, straight) == 0
        optimizer.release()


def test_gradients_that_are_not_finite_are_named_and_nothing_moves():
    model = net()
    optimizer = SparseAdamW(model, Selection.of_masks(random_masks(model)))
    x, y = data(1)[0]
    before = copy.deepcopy(model.state_dict())
    loss(model, x * float("nan"), y).backward()
    with pytest.raises(SurgeryError, match="gradient of '0.weight' is not finite"):
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    optimizer.zero_grad()
    loss(model, x, y).backward()
    optimizer.step()
    assert furthest(model, net()) > 0


@pytest.mark.parametrize("zero", ["optimizer", "model", "never"])
def test_gradients_begin_anew_after_a_step_whoever_zeroes_them(zero):
    """Trainer zeroes the model's gradients alone, and there are none."""
    one, other, batches = net(), net(), data(8)
    chosen = Selection.of_masks(random_masks(one))
    sparse(one, chosen, batches, accumulate=2)
    optimizer = SparseAdamW(other, chosen, lr=LR, betas=BETAS, eps=EPS)
    for at in range(0, 8, 2):
        for x, y in batches[at : at + 2]:
            loss(other, x, y).backward()
        optimizer.step()
        {"optimizer": optimizer.zero_grad, "model": other.zero_grad, "never": lambda: None}[zero]()
    assert furthest(one, other) == 0


@pytest.mark.parametrize("unscale", [True, False])
def test_a_step_that_overflows_under_a_scaler_is_left_out(unscale):
    one, other, batches = net(), net(), data(6)
    chosen = Selection.of_masks(random_masks(one))
    sparse(one, chosen, [batch for i, batch in enumerate(batches) if i != 2])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SparseAdamW(other, chosen, lr=LR, betas=BETAS, eps=EPS)
    for i, (x, y) in enumerate(batches):
        scaler.scale(loss(other, x * (1e30 if i == 2 else 1), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9 and int(optimizer.state[optimizer.flat]["step"]) == 5
    assert furthest(one, other) <= 1e-7


def test_tied_weights_and_gradient_checkpointing_change_nothing():
    torch.set_num_threads(1)
    ids = torch.randint(3, 30, (4, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointed in (False, True):
        model, _ = load("tiny-base")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = SparseAdamW(model, select(model, "magnitude", density=0.05, modules=["attention", "embedding"]))
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model)
    assert furthest(*found) <= 1e-7
    other, _ = load("tiny-base")
    assert not torch.equal(other.lm_head.weight, found[0].lm_head.weight)


def test_what_does_not_fit_is_refused_in_a_sentence():
    model = net()
    chosen = Selection.of_masks(random_masks(model))
    with pytest.raises(SurgeryError, match="another model: .* no parameter '0.weight'"):
        SparseAdamW(nn.Sequential(nn.Flatten(), nn.Linear(16, 32)), chosen)
    with pytest.raises(SurgeryError, match=r"'0.weight' is \[32, 16\] in it, \[4, 16\]"):
        SparseAdamW(nn.Sequential(nn.Linear(16, 4), nn.GELU(), nn.Linear(4, 8)), chosen)
    with pytest.raises(SurgeryError, match="not by 'number'"):
        SparseAdamW(model, chosen, ages="number")
    quantised = nn.Module()
    quantised.w = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SurgeryError, match="quantised"):
        SparseAdamW(quantised, Selection({"w": None}, {"w": (4, 4)}))
    wrong = Selection({"0.weight": torch.tensor([3, 2])}, {"0.weight": (32, 16)})
    with pytest.raises(SurgeryError, match="not ascending"):
        SparseAdamW(model, wrong)


def test_the_result_does_not_depend_on_the_number_of_threads():
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = net()
        sparse(model, Selection.of_masks(random_masks(model)), data(5))
        found.append(model)
    torch.set_num_threads(1)
    assert furthest(*found) == 0


@pytest.mark.parametrize("blocks", [False, True])
def test_of_two_optimizers_of_one_model_the_one_that_listens_gets_the_gradients(blocks):
    """At first the last one made; all of its numbers, weights and biases, and the other one's none."""
    model, other, (x, y) = net(), net(), data(1)[0]
    loss(other, x, y).backward()
    each = [random_masks(model, seed=s) for s in (1, 2)]
    first, last = (SparseAdamW(model, Selection.of_masks(masks), blocks=blocks) for masks in each)
    for _ in range(2):
        loss(model, x, y).backward()
        assert first.flat.grad is None
        assert {"0.weight", "2.weight"} <= set(last.selection)
        for name in last.selection:
            right = other.get_parameter(name).grad[each[1][name]]
            torch.testing.assert_close(last.gradient_of(name), right, rtol=1e-5, atol=1e-8)
        last.zero_grad()
        first, last, each = last, first, each[::-1]
        first.listening, last.listening = False, True
