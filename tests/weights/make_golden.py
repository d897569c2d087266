"""What mergekit 0.1.5 answers to the same tensors, stored: `python tests/weights/make_golden.py` where it is installed.

`CASES` is the parity table, one row a comparison; `tests/weights/test_methods.py` holds our answers to the stored
ones, `test_mergekit_parity.py` to live ones on new tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "mergekit.safetensors"
SHAPES = {"matrix": (16, 24), "vector": (23,)}


class Case(NamedTuple):
    """One comparison: our method and parameters, mergekit's, and which tensors go in."""

    ours: str
    params: dict[str, Any]
    theirs: str
    their_params: dict[str, Any]
    """Lists are one value for each tuned input."""
    inputs: int = 3
    base: bool = True
    distance: float = 1.0
    """Factor on the differences: 0.01 is a small update."""


W = [0.2, 0.5, 0.7]
D = [0.3, 0.5, 0.7]
PAIR = [0.3, 0.5]
MEAN = {"normalize": "weights"}
SUM = {"normalize": "none"}
L1 = {"rescale": "l1"}
BAND = {"weight": 0.4, "density": 0.6, "top": 0.1}
THEIR_BAND = {"weight": 0.4, "density": 0.6, "gamma": 0.1}

CASES: dict[str, Case] = {
    "linear": Case("linear", {"weight": W}, "linear", {"weight": W}, base=False),
    "linear-sum": Case(
        "linear", {"weight": W, "normalize": False}, "linear", {"weight": W, "normalize": False}, base=False
    ),
    "task_arithmetic": Case(
        "task_arithmetic", {"weight": W, "scale": 0.6}, "task_arithmetic", {"weight": W, "lambda": 0.6}
    ),
    "task_arithmetic-mean": Case(
        "task_arithmetic", {"weight": W, **MEAN}, "task_arithmetic", {"weight": W, "normalize": True}
    ),
    "ties": Case("ties", {"weight": W, "density": D}, "ties", {"weight": W, "density": D}),
    "ties-sum": Case(
        "ties",
        {"weight": [0.5, -0.4, 1.0], "density": 0.2, "scale": 0.7, **SUM},
        "ties",
        {"weight": [0.5, -0.4, 1.0], "density": 0.2, "lambda": 0.7, "normalize": False},
    ),
    "ties-rescale": Case(
        "ties", {"weight": W, "density": 0.4, **L1}, "ties", {"weight": W, "density": 0.4, "rescale": True}
    ),
    "ties-one-element": Case("ties", {"density": 0.001}, "ties", {"weight": 1.0, "density": 0.001}),
    "dare_linear": Case("dare_linear", {"weight": W, "density": D, **L1}, "dare_linear", {"weight": W, "density": D}),
    "dare_ties": Case("dare_ties", {"weight": W, "density": D, **L1, **SUM}, "dare_ties", {"weight": W, "density": D}),
    "dare_ties-none": Case(
        "dare_ties",
        {"weight": W, "density": D, "rescale": "none"},
        "dare_ties",
        {"weight": W, "density": D, "rescale": False, "normalize": True},
    ),
    "breadcrumbs": Case("breadcrumbs", BAND, "breadcrumbs", THEIR_BAND),
    "breadcrumbs-narrow": Case(
        "breadcrumbs",
        {"weight": 0.4, "density": 0.95, "top": 0.2},
        "breadcrumbs",
        {"weight": 0.4, "density": 0.95, "gamma": 0.2},
    ),
    "breadcrumbs-all": Case(
        "breadcrumbs",
        {"weight": 0.4, "density": 1.0, "top": 0.2},
        "breadcrumbs",
        {"weight": 0.4, "density": 1.0, "gamma": 0.2},
    ),
    "breadcrumbs_ties": Case("breadcrumbs_ties", {**BAND, **SUM}, "breadcrumbs_ties", THEIR_BAND),
    "breadcrumbs_ties-mean": Case(
        "breadcrumbs_ties",
        {**BAND, "weight": W, **L1},
        "breadcrumbs_ties",
        {**THEIR_BAND, "weight": W, "normalize": True, "rescale": True},
    ),
    "della_linear": Case(
        "della_linear",
        {"weight": W, "density": D, "epsilon": 0.15, **L1},
        "della_linear",
        {"weight": W, "density": D, "epsilon": 0.15},
    ),
    "della": Case(
        "della", {"weight": W, "density": D, "epsilon": 0.1, **L1}, "della", {"weight": W, "density": D, "epsilon": 0.1}
    ),
    "sce": Case("sce", {"topk": 0.4}, "sce", {"select_topk": 0.4}),
    "sce-all": Case("sce", {"topk": 1.0}, "sce", {}),
    "ram": Case("ram", {"epsilon": 0.05}, "ram", {"epsilon": 0.05}),
    "ram_plus": Case("ram_plus", {"epsilon": 0.1}, "ramplus_tl", {"epsilon": 0.1}),
    "ram_plus-strong": Case(
        "ram_plus", {"epsilon": 0.1, "r": 0.5, "alpha": 3.0}, "ramplus_tl", {"epsilon": 0.1, "r": 0.5, "alpha": 3.0}
    ),
    "slerp": Case("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, inputs=1),
    "slerp-near": Case("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, inputs=1, distance=0.01),
    "nuslerp": Case("nuslerp", {"weight": PAIR}, "nuslerp", {"weight": PAIR}, inputs=2),
    "nuslerp-bare": Case("nuslerp", {"weight": PAIR}, "nuslerp", {"weight": PAIR}, inputs=2, base=False),
    "nuslerp-rows": Case(
        "nuslerp", {"weight": PAIR, "flatten": False}, "nuslerp", {"weight": PAIR, "nuslerp_flatten": False}, inputs=2
    ),
    "nuslerp-columns": Case(
        "nuslerp",
        {"weight": PAIR, "flatten": False, "row_wise": True},
        "nuslerp",
        {"weight": PAIR, "nuslerp_flatten": False, "nuslerp_row_wise": True},
        inputs=2,
    ),
    "multislerp": Case("multislerp", {"weight": W}, "multislerp", {"weight": W}),
    "multislerp-bare": Case("multislerp", {"weight": W}, "multislerp", {"weight": W}, base=False),
    "multislerp-sum": Case(
        "multislerp", {"weight": W, "normalize": False}, "multislerp", {"weight": W, "normalize_weights": False}
    ),
    "karcher": Case("karcher", {}, "karcher", {}, base=False),
    "karcher-near": Case("karcher", {}, "karcher", {}, base=False, distance=0.1),
    "model_stock": Case("model_stock", {}, "model_stock", {}),
    "model_stock-rows": Case("model_stock", {"filter_wise": True}, "model_stock", {"filter_wise": True}),
    "nearswap": Case("nearswap", {"t": 0.05}, "nearswap", {"t": 0.05}, inputs=1),
    "arcee_fusion": Case("arcee_fusion", {}, "arcee_fusion", {}, inputs=1),
    "passthrough": Case("passthrough", {"scale": 0.7}, "passthrough", {"scale": 0.7}, inputs=1, base=False),
}


def family(shape: tuple[int, ...], seed: int) -> tuple[list[Tensor], Tensor]:
    """Three tuned tensors with partly common updates, and their base: float32, all magnitudes distinct."""
    random = torch.Generator().manual_seed(seed)
    base, common, *own = (torch.randn(shape, generator=random) for _ in range(5))
    return [0.5 * base + 0.1 * common + 0.1 * d for d in own], 0.5 * base


def chosen(case: Case, tuned: list[Tensor], base: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The tensors that go into this case."""
    near = [base + case.distance * (f - base) for f in tuned[: case.inputs]]
    return near, base if case.base else None


def mergekit(case: Case, tuned: list[Tensor], base: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """mergekit's answer, and the random masks that it drew, one for each input."""
    from mergekit.merge_methods import merge_tensors

    masks: list[Tensor] = []
    draw = torch.bernoulli

    def recorded(probability: Tensor) -> Tensor:
        masks.append(draw(probability))
        return masks[-1]

    ids = [f"f{i}" for i in range(len(tuned))]
    params = {k: dict(zip(ids, v, strict=True)) if isinstance(v, list) else v for k, v in case.their_params.items()}
    tensors = list(tuned) if base is None else [base, *tuned]
    torch.bernoulli = recorded
    try:
        merged = merge_tensors(
            tensors,
            case.theirs,
            parameters=params,
            ids=ids if base is None else ["base", *ids],
            base_index=None if base is None else 0,
            dtype=torch.float32,
        )
    finally:
        torch.bernoulli = draw
    return merged, [m.reshape(tuned[0].shape).bool() for m in masks]


def main() -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    stored = {}
    for shape_name, shape in SHAPES.items():
        tuned, base = family(shape, seed=1)
        stored |= {f"{shape_name}/base": base} | {f"{shape_name}/tuned{i}": f for i, f in enumerate(tuned)}
        for name, case in CASES.items():
            merged, masks = mergekit(case, *chosen(case, tuned, base))
            stored[f"{shape_name}/{name}"] = merged.contiguous()
            stored |= {f"{shape_name}/{name}/mask{i}": m for i, m in enumerate(masks)}
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(stored, GOLDEN, metadata={"mergekit": "0.1.5", "torch": torch.__version__})
    print(f"{GOLDEN.name}: {len(stored)} tensors, {GOLDEN.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
