"""The fast forms against the reference, on float32 and on bfloat16 inputs full of equal magnitudes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.weights import streams as streams_module
from surgery.weights.combinations import gram
from surgery.weights.kernels import KERNELS, merged
from surgery.weights.methods import METHODS
from surgery.weights.selection import cuts
from surgery.weights.streams import Streams, Workspace

SHAPES = [(70, 33), (257,), (3, 5, 7), (1, 900), ()]


def family(shape, inputs, *, dtype=torch.float32, update=1e-3, seed=0):
    """A base and fine-tunings of it with updates of the given size."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    tuned = [(base.float() + torch.randn(shape, generator=generator) * update).to(dtype) for _ in range(inputs)]
    return base, tuned


def walk(base, tuned, **options):
    """Streams over whole tensors."""

    def reader(x):
        return (lambda i, j: x[i:j]) if x.ndim else (lambda i, j: x)

    read_base = None if base is None else reader(base)
    return Streams("t", tuple(tuned[0].shape), [reader(x) for x in tuned], read_base, Workspace(), **options)


def run(name, base, tuned, parameters):
    """The kernel's result in one tensor."""
    method = METHODS.lookup(name)
    streams = walk(base, tuned)
    rows = [chunk.clone() for _, chunk in merged(method, streams, parameters)]
    return torch.cat(rows).view(tuned[0].shape)


CASES = [
    ("linear", 3, {"weight": [0.5, 0.2, 0.4]}, False),
    ("linear", 2, {"weight": [0.5, 0.2], "normalize": False}, False),
    ("task_arithmetic", 3, {"weight": [0.5, 0.2, -0.4], "scale": 0.7}, True),
    ("task_arithmetic", 2, {"weight": [0.5, 0.2], "normalize": "weights"}, True),
    ("ties", 2, {"density": 0.2}, True),
    ("ties", 3, {"weight": [0.5, 1.0, -0.3], "density": [0.2, 0.5, 1.0], "scale": 0.4}, True),
    ("ties", 3, {"density": 0.3, "normalize": "count", "election": "unweighted", "weight": [1.0, 0.3, 0.2]}, True),
    ("ties", 3, {"density": 0.3, "normalize": "none", "election": "frequency", "weight": [1.0, -0.3, 0.2]}, True),
    ("ties", 2, {"density": 0.3, "rescale": "l1", "ties": "all"}, True),
    ("ties", 2, {"density": 0.3, "ties": "none"}, True),
    ("ties", 2, {"density": 0.3, "ties": "random", "keys": [5, 6]}, True),
    ("ties", 2, {"density": 0.0}, True),
    ("breadcrumbs", 2, {"weight": [0.2, 0.6]}, True),
    ("breadcrumbs", 3, {"density": 0.8, "top": 0.4}, True),
    ("breadcrumbs", 2, {"bottom": 0.7, "top": 0.1}, True),
    ("breadcrumbs", 2, {"scope": "row", "density": 0.3, "top": 0.1}, True),
    ("breadcrumbs_ties", 2, {"density": 0.14, "top": 0.01}, True),
    ("breadcrumbs_ties", 3, {"density": 0.14, "normalize": "none", "weight": [0.4, 0.2, 0.3]}, True),
    ("dare_linear", 2, {"density": 0.4, "keys": [11, 12]}, True),
    ("dare_linear", 2, {"density": 0.005, "keys": [11, 12]}, True),
    ("dare_linear", 2, {"density": [0.99999, 0.0], "keys": [11, 12]}, True),
    ("dare_ties", 2, {"density": [0.4, 1.0], "rescale": "l1", "normalize": "none", "keys": [11, 12]}, True),
    ("dare_ties", 3, {"density": 0.5, "rescale": "none", "keys": [1, 2, 3]}, True),
    ("slerp", 1, {"t": 0.3}, True),
    ("nuslerp", 2, {"weight": [0.3, 0.9]}, True),
    ("nuslerp", 2, {"weight": [0.3, 0.9]}, False),
    ("nuslerp", 2, {"flatten": False}, True),
    ("multislerp", 3, {"weight": [0.3, 0.9, 0.5]}, True),
    ("multislerp", 1, {}, True),
    ("multislerp", 3, {}, False),
    ("karcher", 3, {"weight": [0.3, 0.9, 0.5]}, False),
    ("model_stock", 3, {}, True),
    ("model_stock", 2, {"filter_wise": True}, True),
    ("della", 2, {"density": 0.5, "keys": [1, 2]}, True),
    ("magmax", 3, {}, True),
    ("ram", 2, {}, True),
    ("nearswap", 1, {"t": 1e-3}, True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "inputs", "parameters", "with_base"), CASES)
def test_kernel_equals_reference(monkeypatch, name, inputs, parameters, with_base, dtype, shape):
    monkeypatch.setattr(streams_module, "CHUNK", 128)  # many chunks
    base, tuned = family(shape, inputs, dtype=dtype, update=1e-2)
    base = base if with_base else None
    fast = run(name, base, tuned, parameters)
    floats, origin = [t.float() for t in tuned], None if base is None else base.float()
    plain = METHODS.lookup(name).function(floats, origin, **parameters)
    assert torch.isfinite(fast).all()
    torch.testing.assert_close(fast, plain, rtol=0, atol=2e-6 * float(plain.abs().max()) + 1e-12)


@pytest.mark.parametrize("name", sorted(KERNELS) or ["ties"])
def test_every_kernel_has_a_reference(name):
    assert name in METHODS


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 400),
    share=st.floats(0, 1),
    update=st.sampled_from([1e-2, 1e-3, 1e-4, 1e-5, 0.0]),
    seed=st.integers(0, 10**6),
)
def test_radix_selection_is_a_stable_sort(n, share, update, seed):
    base, (tuned,) = family((n,), 1, dtype=torch.bfloat16, update=update, seed=seed)
    d = tuned.float() - base.float()
    k = int(share * n)
    work = Workspace()
    pieces = list(d.split(37))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.sort(d.abs(), descending=True, stable=True).indices[:k]] = True
    good, misleading = d[: max(1, n // 2)], torch.full((9,), 1e-20)
    for sample in (None, [good], [misleading]):
        [[cut]] = cuts(lambda: ([p] for p in pieces), [[k]], work, sample=sample, numel=n)
        kept = torch.cat([cut.keep(p, torch.empty_like(p), work) for p in pieces])
        assert torch.equal(kept, d * mask)


def test_result_does_not_depend_on_the_chunk_size(monkeypatch):
    base, tuned = family((300, 17), 2, dtype=torch.bfloat16, update=1e-4)
    results = []
    for size in (17, 1000, 1 << 18):
        monkeypatch.setattr(streams_module, "CHUNK", size)
        results.append(run("breadcrumbs_ties", base, tuned, {"density": 0.2}))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_gram_in_float64():
    base, tuned = family((500, 300), 2)
    expected = torch.stack([(t - base).double().view(-1) for t in tuned])
    torch.testing.assert_close(gram(walk(base, tuned), of_deltas=True), expected @ expected.T, rtol=1e-6, atol=0)


def test_not_a_number_is_named_and_counted():
    base, tuned = family((40, 10), 2)
    tuned[1][3, 4] = float("nan")
    tuned[1][39, 9] = float("inf")
    with pytest.raises(SurgeryError, match=r"input 2: tensor 't' has 2 values"):
        list(merged(METHODS.lookup("ties"), walk(base, tuned), {}))
    streams = walk(base, tuned, nonfinite="base")
    out = torch.cat([c.clone() for _, c in merged(METHODS.lookup("task_arithmetic"), streams, {})]).view(40, 10)
    assert streams.replaced == 2
    assert out[3, 4] == tuned[0][3, 4] or torch.isclose(out[3, 4], tuned[0][3, 4])
