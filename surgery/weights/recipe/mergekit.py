"""mergekit's merge methods in our words: what its parameters are called here, and their defaults in 0.1.5.

A recipe of this dialect gives the result that mergekit gives, so its defaults (density 1, for one) are filled in
explicitly. Rounding is the exception: arithmetic is in float32 here, whatever `dtype` says.
"""

from __future__ import annotations

from typing import Any

from surgery.weights.recipe.contract import Contract, Parameter

WEIGHT = Parameter("weight", float, required=True, per_input=True)
DENSITY = Parameter("density", float, default=1.0, per_input=True)
EPSILON = Parameter("epsilon", float, default=1e-5)
NO_EFFECT = Parameter(None, bool)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", bool, default=default, convert=lambda on: "weights" if on else "none")


def _rescale(default: bool) -> Parameter:
    return Parameter("rescale", bool, default=default, convert=lambda on: "l1" if on else "none")


def _task_vectors(
    method: str, *, normalize: bool = False, rescale: Parameter = NO_EFFECT, fixed: dict[str, Any] | None = None,
    **extra: Parameter,
) -> Contract:  # fmt: skip
    parameters = {
        "weight": WEIGHT,
        "density": DENSITY,
        "lambda": Parameter("scale", float, default=1.0),
        "normalize": _normalize(normalize),
        "rescale": rescale,
        "int8_mask": NO_EFFECT,
        **extra,
    }
    return Contract(method, "required", (1, None), parameters, fixed or {})


_GAMMA = Parameter("top", float, default=0.01, per_input=True)
_DELLA = Parameter("epsilon", float, default=0.15, per_input=True)

METHODS: dict[str, Contract] = {
    "linear": Contract(
        "linear", "ignored", (1, None), {"weight": WEIGHT, "normalize": Parameter("normalize", bool, default=True)}
    ),
    "task_arithmetic": _task_vectors("task_arithmetic", density=Parameter(None, float)),
    "ties": _task_vectors("ties", normalize=True, rescale=_rescale(False)),
    "dare_linear": _task_vectors("dare_linear", rescale=_rescale(True)),
    "dare_ties": _task_vectors("dare_ties", rescale=_rescale(True)),
    "breadcrumbs": _task_vectors("breadcrumbs", rescale=_rescale(False), gamma=_GAMMA),
    "breadcrumbs_ties": _task_vectors("breadcrumbs_ties", rescale=_rescale(False), gamma=_GAMMA),
    "della": _task_vectors("della", normalize=True, rescale=_rescale(True), epsilon=_DELLA),
    "della_linear": _task_vectors("della_linear", rescale=_rescale(True), epsilon=_DELLA),
    "slerp": Contract("slerp", "required", (1, 1), {"t": Parameter("t", float, required=True)}),
    "nuslerp": Contract(
        "nuslerp", "optional", (2, 2),
        {
            "weight": WEIGHT,
            "nuslerp_flatten": Parameter("flatten", bool, default=True),
            "nuslerp_row_wise": Parameter("row_wise", bool, default=False),
        },
    ),
    "multislerp": Contract(
        "multislerp", "optional", (1, None),
        {
            "weight": WEIGHT,
            "normalize_weights": Parameter("normalize", bool, default=True),
            "eps": Parameter("eps", float, default=1e-8),
        },
    ),
    "karcher": Contract(
        "karcher", "ignored", (1, None),
        {"max_iter": Parameter("max_iter", int, default=10), "tol": Parameter("tol", float, default=1e-5)},
    ),
    "model_stock": Contract(
        "model_stock", "required", (2, None), {"filter_wise": Parameter("filter_wise", bool, default=False)}
    ),
    "nearswap": Contract("nearswap", "required", (1, 1), {"t": Parameter("t", float, required=True)}),
    "arcee_fusion": Contract("arcee_fusion", "required", (1, 1), {}),
    "passthrough": Contract(
        "passthrough", "ignored", (1, 1), {"scale": Parameter("scale", float, per_input=True)}
    ),
    "sce": Contract(
        "sce", "required", (1, None),
        {"select_topk": Parameter("topk", float, default=1.0), "int8_mask": NO_EFFECT},
    ),
    "ram": Contract("ram", "required", (1, None), {"epsilon": EPSILON}),
    "ramplus_tl": Contract(
        "ram_plus", "required", (1, None),
        {"r": Parameter("r", float, default=0.1), "alpha": Parameter("alpha", float, default=0.2), "epsilon": EPSILON},
    ),
}  # fmt: skip

# every parameter word of the dialect: mergekit ignores those that a method lacks, and so do we, with a note
WORDS: dict[str, Parameter] = {word: p for contract in METHODS.values() for word, p in contract.parameters.items()}
