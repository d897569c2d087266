"""The nuclear norm acts on the numbers that move, one random matrix a step, resumably."""

import pytest
import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.tuning import Selection, SparseAdamW
from surgery.tuning.nuclear import NuclearNorm, nuclear_norm, nuclear_subgradient

torch.set_num_threads(1)


def masked(shape, density=0.3, seed=0):
    """A random matrix and the flat positions that may move."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    places = (torch.rand(shape, generator=generator).flatten() < density).nonzero().view(-1)
    return weight, places.int()


@pytest.mark.parametrize("shape", [(70, 110), (110, 70), (80, 80)])
def test_norm_and_gradient_are_those_of_autograd(shape):
    """Norm to 1e-5 of itself; gradient to 1e-4 (it is autograd's SVD, in float32, that is off)."""
    weight, places = masked(shape)
    mask = torch.zeros(weight.numel()).index_fill_(0, places.long(), 1).view(shape)
    leaf = weight.clone().requires_grad_()
    theirs = torch.linalg.matrix_norm(leaf * mask, "nuc")
    theirs.backward()
    values = weight.flatten()[places.long()]
    assert float(nuclear_norm(values, places, shape)) == pytest.approx(theirs.item(), rel=1e-5)
    found = nuclear_subgradient(values, places, shape)
    assert found.dtype == torch.float32 and found.shape == values.shape
    assert (found - leaf.grad.flatten()[places.long()]).abs().max() <= 1e-4


def test_all_numbers_of_a_matrix_need_no_places():
    weight, _ = masked((66, 90))
    everywhere = torch.arange(weight.numel())
    ours = nuclear_subgradient(weight.flatten(), None, (66, 90))
    assert torch.equal(ours, nuclear_subgradient(weight.flatten(), everywhere, (66, 90)))


def test_of_a_matrix_without_full_rank_the_smallest_subgradient():
    """Rank 3: U V^T of three pairs, where an SVD would make up 67 more. A matrix of zeros has 0."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(70, 3, generator=generator).double(), torch.randn(3, 100, generator=generator).double()
    weight = left @ right
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    found = nuclear_subgradient(weight.flatten(), None, (70, 100)).view(70, 100)
    assert (found - u[:, :3] @ vh[:3]).abs().max() <= 1e-9
    assert not nuclear_subgradient(torch.zeros(7000), None, (70, 100)).any()


def test_small_singular_values_keep_their_directions():
    """Down to 1e-5 of the largest: 1e-6 from the float64 SVD."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(70, 70, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(90, 70, generator=generator, dtype=torch.float64))[0]
    weight = (u * torch.logspace(0, -5, 70, dtype=torch.float64)) @ v.T
    found = nuclear_subgradient(weight.flatten(), None, (70, 90)).view(70, 90)
    assert (found - u @ v.T).abs().max() <= 1e-6


# ---- in an optimizer


def three():
    """Two matrices that are large enough, one that is not, a vector; with places and an empty flat gradient."""
    shapes = {"b.weight": (70, 80), "a.weight": (90, 66), "small.weight": (64, 200), "norm.weight": (300,)}
    weights, places = {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        weights[name], places[name] = masked(shape, seed=i)
    flat = torch.zeros(sum(map(len, places.values())))
    gradient, at = {}, 0
    for name, chosen in places.items():
        gradient[name], at = flat[at : at + len(chosen)], at + len(chosen)
    return weights, places, gradient, flat


def test_the_term_lands_in_the_flat_gradient_of_one_matrix():
    weights, places, gradient, flat = three()
    before = {name: w.clone() for name, w in weights.items()}
    term = NuclearNorm(weight=0.25, seed=3)
    found = term.penalty(7, weights, places, gradient)
    name = term.sample(7, {n: tuple(w.shape) for n, w in weights.items()})
    values = weights[name].flatten()[places[name].long()]
    assert found == pytest.approx(0.25 * float(nuclear_norm(values, places[name], tuple(weights[name].shape))))
    expected = 0.25 * nuclear_subgradient(values, places[name], tuple(weights[name].shape))
    assert torch.allclose(gradient[name], expected, atol=1e-7)
    assert int((flat != 0).sum()) == int((expected != 0).sum())  # the others got nothing
    assert all(torch.equal(weights[n], before[n]) for n in weights)


def test_it_adds_to_the_gradient_that_is_there():
    weights, places, gradient, flat = three()
    flat.fill_(1.0)
    NuclearNorm(weight=0.25).penalty(0, weights, places, gradient)
    other = three()
    NuclearNorm(weight=0.25).penalty(0, *other[:3])
    assert torch.equal(flat, other[3] + 1.0)


@pytest.mark.parametrize("weight, sinks", [(0.02, True), (0.0, False)])
def test_steps_along_it_lower_the_norm_of_what_moves(weight, sinks):
    """The released memory-saving optimizer leaves the weights bit-identical at any weight: here only at 0."""
    weights, places, gradient, flat = three()
    name, start = "b.weight", {n: w.clone() for n, w in weights.items()}

    def norm():
        return float(nuclear_norm(weights[name].flatten()[places[name].long()], places[name], (70, 80)))

    first = norm()
    for step in range(20):
        flat.zero_()
        told = NuclearNorm(weight=weight, seed=1).penalty(step, weights, places, gradient)
        assert (told is None) is not sinks
        for n, w in weights.items():
            w.view(-1).index_add_(0, places[n], gradient[n], alpha=-1.0)
    if sinks:
        assert norm() < 0.97 * first
        still = torch.ones(70 * 80, dtype=torch.bool).index_fill_(0, places[name].long(), False)
        assert torch.equal(weights[name].flatten()[still], start[name].flatten()[still])
    else:
        assert all(torch.equal(weights[n], start[n]) for n in weights)


def test_the_choice_is_a_function_of_step_and_seed():
    """Whatever the order of names and whatever was drawn before; narrow matrices and vectors never."""
    shapes = {n: tuple(w.shape) for n, w in three()[0].items()}
    turned = dict(reversed(shapes.items()))
    picks = [NuclearNorm(seed=5).sample(step, shapes) for step in range(40)]
    assert set(picks) == {"a.weight", "b.weight"}
    assert picks[::-1] == [NuclearNorm(seed=5).sample(step, turned) for step in reversed(range(40))]
    assert picks != [NuclearNorm(seed=6).sample(step, shapes) for step in range(40)]
    told = [NuclearNorm(every=3).sample(step, shapes) is not None for step in range(7)]
    assert told == [True, False, False, True, False, False, True]
    assert NuclearNorm().sample(0, {"norm.weight": (300,), "small.weight": (64, 200)}) is None


def tuned(term, steps=30, cut=None):
    """Two layers after SparseAdamW on random regression; the share that moves is the smallest third of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 70), nn.Tanh(), nn.Linear(70, 72))
    x, y = torch.randn(64, 80), torch.randn(64, 72)
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    sizes = {n: p.detach().abs() for n, p in weights.items()}
    masks = {n: size < size.flatten().kthvalue(size.numel() // 3).values for n, size in sizes.items()}
    chosen = Selection.of_masks(masks)
    start = {n: p.detach().clone() for n, p in weights.items()}
    optimizer = SparseAdamW(model, chosen, lr=3e-3, penalty=term and term.penalty)
    for step in range(steps):
        if step == cut:  # as after a restart
            state = optimizer.state_dict()
            optimizer.release()
            optimizer = SparseAdamW(model, chosen, penalty=term.penalty)
            optimizer.load_state_dict(state)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = {n: p.detach() for n, p in weights.items()}
    return start, masks, ends


def test_in_the_optimizer_it_reaches_the_numbers_that_move_and_no_others():
    """Lower norms of what moves; everything else keeps its bits; weight 0 is no term; a restart changes nothing."""
    start, masks, plain = tuned(None)
    zero, pressed, again = (tuned(NuclearNorm(w, seed=1), cut=c)[2] for w, c in ((0.0, None), (5e-3, None), (5e-3, 11)))
    for name, mask in masks.items():
        places = mask.flatten().nonzero().view(-1)
        free, held = (nuclear_norm(e[name][mask], places, mask.shape) for e in (plain, pressed))
        assert held < 0.9 * free
        assert torch.equal(pressed[name][~mask], start[name][~mask])
        assert torch.equal(zero[name], plain[name]) and torch.equal(again[name], pressed[name])


@pytest.mark.parametrize("words", [{"weight": -1.0}, {"weight": float("nan")}, {"every": 0}])
def test_nonsense_is_refused(words):
    with pytest.raises(SurgeryError, match="nuclear norm"):
        NuclearNorm(**words)
