"""What can be wrong with a recipe whose every part is right: counts of models, unequal slices, impossible values."""

from __future__ import annotations

from surgery.weights.recipe.contract import Contract, Leaf, Parameter
from surgery.weights.recipe.field import Field
from surgery.weights.recipe.schema import Recipe, Resolved, Slice, resolve

# gradients are straight between their points, so a few depths find what is impossible somewhere
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_FILTERS = 20
_AVERAGES = ("linear", "multislerp")


def check_inputs(piece: Slice, contract: Contract, method: str, field: Field) -> None:
    """The number of models and the lengths of their layer ranges."""
    few, most = contract.inputs
    count = len(piece.inputs)
    if count < few or (most is not None and count > most):
        wanted = f"{few}" if few == most else f"at least {few}" if count < few else f"at most {most}"
        besides = " besides the base" if piece.base else ""
        raise field.error(f"has {_models(count)}{besides}, but {method} takes {wanted}")
    members = [*piece.inputs, piece.base] if piece.base else piece.inputs
    lengths = {m.layers[1] - m.layers[0] for m in members if m.layers}
    if len(lengths) > 1:
        ranges = ", ".join(f"{m.model} {list(m.layers)}" for m in members if m.layers)
        raise field.error(f"takes different numbers of layers from its models: {ranges}")


def check_values(recipe: Recipe, contract: Contract, root: Field) -> None:
    """Resolve every parameter at sample tensors: required ones are there, weights don't cancel, DELLA's range fits."""
    by_name = {p.name: p for p in contract.parameters.values() if p.name}
    words = {p.name: word for word, p in contract.parameters.items() if p.name}
    for piece in recipe.slices:
        for tensor in _sample_names(recipe, piece):
            for t in _DEPTHS:
                values = resolve(recipe, by_name, piece, tensor, t)
                for name, parameter in by_name.items():
                    holes = _holes(values.get(name), parameter.default, len(piece.inputs), parameter.per_input)
                    if parameter.required and holes:
                        raise _missing(piece, parameter, words[name], tensor, holes, root)
                normalize = by_name["normalize"].default if "normalize" in by_name else None
                _check_weights(recipe, values, values.get("normalize", normalize), tensor, root)
                if recipe.method.startswith("della"):
                    _check_della(values, len(piece.inputs), root)


def _sample_names(recipe: Recipe, piece: Slice) -> list[str]:
    """One name for each filter, and one that no filter matches."""
    scopes = [recipe.parameters, piece.parameters, *(m.parameters for m in recipe.modules.values())]
    scopes += [i.parameters for i in piece.inputs]
    filters = dict.fromkeys(f for scope in scopes for value in scope.values() for f in value.filters)
    return ["", *list(filters)[:_MAX_FILTERS]]


def _holes(value: Resolved | None, default: Leaf | None, inputs: int, per_input: bool) -> list[int]:
    """The inputs (0 for a shared parameter) that have no value and no default."""
    if default is not None:
        return []
    if not per_input:
        return [0] if value is None else []
    values = value if isinstance(value, list) else [None] * inputs
    return [i for i, v in enumerate(values) if v is None]


def _missing(piece: Slice, parameter: Parameter, word: str, tensor: str, holes: list[int], root: Field) -> Exception:
    model = f" for {piece.inputs[holes[0]].model}" if parameter.per_input else ""
    named = f" for tensors whose name contains '{tensor}'" if tensor else ""
    return root.error(
        f"has no '{word}'{model}{named}",
        f"Give '{word}' under its 'parameters', or under the top-level ones for all; "
        "a list of filters needs a last entry without one.",
    )


def _check_weights(recipe: Recipe, values: dict[str, Resolved], normalize: object, tensor: str, root: Field) -> None:
    weights = values.get("weight")
    if not isinstance(weights, list) or normalize not in (True, "weights"):
        return
    # mergekit's task-vector methods take a sum of zero for one, and weights that are all 0 leave the base
    if recipe.method not in _AVERAGES and (recipe.dialect == "mergekit" or not any(weights)):
        return
    if abs(sum(w for w in weights if isinstance(w, int | float))) < 1e-8:
        contained = f" for tensors whose name contains '{tensor}'" if tensor else ""
        raise root.error(
            f"has weights {weights} that sum to 0{contained}, and they are to be normalised by their sum",
            "Change a weight, or set 'normalize' off.",
        )


def _check_della(values: dict[str, Resolved], inputs: int, root: Field) -> None:
    densities, epsilons = _listed(values.get("density"), inputs), _listed(values.get("epsilon"), inputs)
    for density, epsilon in zip(densities, epsilons, strict=False):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise root.error(f"has density {density:g}, epsilon {epsilon:g}; density - epsilon and density + epsilon "
                             "must lie between 0 and 1", "Choose a smaller epsilon.")  # fmt: skip


def _listed(value: Resolved | None, inputs: int) -> list[float]:
    values = value if isinstance(value, list) else [value] * inputs
    return [float(v) for v in values if isinstance(v, int | float)]


def _models(count: int) -> str:
    return "1 model" if count == 1 else f"{count} models"
