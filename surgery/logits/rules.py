"""The published ways to combine models at the output, each a line of algebra.

| rule | scores | tokens | source |
|---|---|---|---|
| `eft` | large + beta * (tuned - small) | | Mitchell et al. 2023, arXiv:2310.12962 |
| `mixture` | large + sum_j w_j * (tuned_j - small) | | the same, section on reward mixtures |
| `proxy_tuning` | base + alpha * (expert - antiexpert) | | Liu et al. 2024, arXiv:2401.08565 |
| `dexperts` | the same | nucleus or top-k of the base | Liu et al. 2021, arXiv:2105.03023 |
| `contrastive` | expert - amateur, and a later form | plausible for the expert | arXiv:2210.15097, arXiv:2309.09117 |
| `dola` | model - the same model's premature layer | plausible for the model | Chuang et al. 2024, arXiv:2309.03883 |
| `unir` | backbone + sum_j alpha_j * reasoner_j | | Kim et al. 2025, arXiv:2505.19075 |
| `cge` | tuned - gamma * base | plausible for the tuned model | "What's New in My Data?", arXiv:2410.14765 |
| `guidance` | (1 + g) * conditioned - g * unconditioned | | Sanchez et al. 2023, arXiv:2306.17806 |
| `product` | sum_j w_j * model_j, sum of w = 1 | | Hinton 2002, products of experts |
| `layers` | sum_j w_j * (the model's layer j by its logit lens) | | after LEVI, see there |

Every argument that is a model is what `member` gives, or a sum of such; anything else is refused (`SurgeryError`). A
new rule is one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.errors import SurgeryError
from surgery.logits.combine import Mode
from surgery.logits.ensemble import Ensemble
from surgery.logits.members import Style
from surgery.registry import Registry

RULES: Registry[Callable[..., Ensemble]] = Registry("rule")


@RULES.register("eft")
def eft(
    large: Ensemble, tuned: Ensemble, small: Ensemble, beta: float = 1.0, *,
    filter_p: float = 1.0, filter_on: str = "base", mode: Mode = "zero_reward",
) -> Ensemble:  # fmt: skip
    """Emulated fine-tuning: large + beta * (tuned - small), for up-scaling; small and large swapped for down-scaling.

    log p(y_t) = log softmax(log p_large + beta (log p_tuned - log p_small)) (equation 5, normalised at each token).
    beta above 1 amplifies. `filter_p` below 1 is conservative decoding: the reward counts only in the nucleus of
    `filter_on` ("base": the large model, "tuned", or "scores": the composition); which of them the paper means is not
    known to us. `mode` "mask" forbids the other tokens instead.
    """
    _members(large, tuned, small)
    return _conservative(large + beta * (tuned - small), filter_p, filter_on, mode, large, tuned)


@RULES.register("mixture")
def mixture(
    large: Ensemble, tuned: Ensemble | Sequence[Ensemble], small: Ensemble | Sequence[Ensemble],
    weights: Sequence[float] | float = 0.5,
) -> Ensemble:  # fmt: skip
    """Several rewards at once: large + sum_j w_j * (tuned_j - small_j).

    One number lambda is (lambda, 1 - lambda) for two tuned models; of one, its weight. Members with one `small` run it
    once.
    """
    tuned = [tuned] if isinstance(tuned, Ensemble) else list(tuned)
    bases = [small] * len(tuned) if isinstance(small, Ensemble) else list(small)
    _members(large, *tuned, *bases)
    factors = [weights, 1 - weights][: max(1, len(tuned))] if isinstance(weights, (int, float)) else list(weights)
    _same_number(tuned, bases, "tuned models", "bases")
    _same_number(tuned, factors, "tuned models", "weights")
    found = large
    for one, base, weight in zip(tuned, bases, factors, strict=True):
        found = found + weight * (one - base)
    return found


@RULES.register("proxy_tuning")
def proxy_tuning(base: Ensemble, expert: Ensemble, antiexpert: Ensemble, alpha: float = 1.0) -> Ensemble:
    """base + alpha * (expert - antiexpert); the paper decodes greedily, with alpha 1."""
    _members(base, expert, antiexpert)
    return base + alpha * (expert - antiexpert)


@RULES.register("dexperts")
def dexperts(
    base: Ensemble, expert: Ensemble, antiexpert: Ensemble, alpha: float = 2.0, *,
    top_p: float = 0.9, top_k: int = 0,
) -> Ensemble:  # fmt: skip
    """base + alpha * (expert - antiexpert) on the base's nucleus, or on its `top_k` likeliest tokens.

    Truncation comes before the steering: what the base finds unlikely can't be brought back (section 2).
    """
    _members(base, expert, antiexpert)
    found = base + alpha * (expert - antiexpert)
    if top_k:
        return found.filtered("top_k", top_k, on=base)
    return found if top_p == 1 else found.filtered("nucleus", top_p, on=base)


@RULES.register("contrastive")
def contrastive(
    expert: Ensemble, amateur: Ensemble, alpha: float = 0.1, *, beta: float | None = None, temperature: float = 1.0
) -> Ensemble:
    """expert - amateur on the tokens that are plausible for the expert: p >= alpha * max p.

    With `beta` the later form (1 + beta) * expert - beta * amateur (arXiv:2309.09117, there 0.5). alpha 1 is the
    expert's greedy decoding. `temperature` is the amateur's own (the released code runs GPT-2 with 0.5): its
    log-probabilities at temperature T are 1/T times those at 1, up to a constant that the softmax does not see.
    """
    _members(expert, amateur)
    if not temperature > 0:
        raise SurgeryError(f"The amateur's temperature is {temperature}; expected a number above 0.")
    amateur = amateur / temperature
    found = expert - amateur if beta is None else (1 + beta) * expert - beta * amateur
    return found.filtered("plausible", alpha, on=expert)


@RULES.register("dola")
def dola(model: Ensemble, layers: int | Sequence[int], alpha: float = 0.1, *, base: Ensemble | None = None) -> Ensemble:
    """The model minus its own premature layer, on its plausible tokens.

    `layers` is one layer's index (its stream after the block, through the final norm and the head), or a bucket of
    which at each token the one farthest from the model counts (Jensen-Shannon). With `base`, the layer is read of that
    model instead, the fine-tuning's own source: what is left is what came late or by tuning. The paper decodes with a
    repetition penalty of 1.2, which is no part of the rule. The released code does otherwise: its layer j is j - 1 here
    (its 0 the embeddings), the head reads it without the final norm, the divergences are those of the mean from the two
    distributions (not of each from the mean, equation 3), and a whole batch has one premature layer.
    """
    _members(model, *([] if base is None else [base]))
    one = (base or model).base
    layer = layers if isinstance(layers, int) else tuple(layers)
    lens = replace(one, layer=layer)
    return (model - Ensemble([(lens, 1.0)])).filtered("plausible", alpha, on=model)


@RULES.register("unir")
def unir(
    backbone: Ensemble, reasoners: Ensemble | Sequence[Ensemble] | Mapping[str, Ensemble | tuple[Ensemble, float]],
    alpha: float | Sequence[float] = 1.0,
) -> Ensemble:  # fmt: skip
    """backbone + sum_j alpha_j * reasoner_j: the Universal Reasoner, with any number of modules (section 3).

    In a mapping modules come by name, each as (module, its alpha), or alone with the one `alpha`.
    A module's initial state is an instruct model, not nothing: at the start of its training this is a product of
    experts, not the backbone; subtract the initial module (`- alpha * initial`) to begin at the backbone.
    """
    if isinstance(reasoners, Mapping):
        pairs: list[Any] = [one if isinstance(one, tuple) else (one, alpha) for one in reasoners.values()]
        modules, factors = [m for m, _ in pairs], [a for _, a in pairs]
    else:
        modules = [reasoners] if isinstance(reasoners, Ensemble) else list(reasoners)
        factors = [alpha] * len(modules) if isinstance(alpha, (int, float)) else list(alpha)
    _same_number(modules, factors, "modules", "weights")
    _members(backbone, *modules)
    found = backbone
    for module, factor in zip(modules, factors, strict=True):
        found = found + factor * module
    return found


@RULES.register("cge")
def cge(
    tuned: Ensemble, base: Ensemble, gamma: float = 1.0, alpha: float = 0.1, *, allow_unconstrained: bool = False
) -> Ensemble:
    """tuned - gamma * base on the tokens that are plausible for the tuned model: what is new in its data.

    alpha 0 lets the ratio explode where both find a token impossible: refused unless `allow_unconstrained`.
    """
    if alpha == 0 and not allow_unconstrained:
        raise SurgeryError("With alpha 0 tokens that both models find impossible decide.",
                           hint="The paper has alpha 0.1; allow_unconstrained=True if you mean it.")  # fmt: skip
    _members(tuned, base)
    found = tuned - gamma * base
    return found.filtered("plausible", alpha, on=tuned) if alpha else found


@RULES.register("guidance")
def guidance(
    model: Ensemble, scale: float, *, unconditioned: Style | Ensemble = lambda prompt: last_token(prompt)
) -> Ensemble:
    """Classifier-free guidance: scale * conditioned + (1 - scale) * unconditioned, one model with two prompts.

    `scale` is as in transformers (`guidance_scale`): 1 is the model, g = scale - 1. `unconditioned` is how the other
    prompt is made of the prompt (default: its last token alone, as in transformers), for every member of a sum; or an
    ensemble. "" and [] are the token that texts begin with.
    """
    _members(model)
    if isinstance(unconditioned, Ensemble):
        other = unconditioned
    else:
        other = Ensemble([(replace(one, prompt=unconditioned), weight) for one, weight in model.terms])
    return scale * model + (1 - scale) * other


def last_token(prompt: Sequence[int]) -> list[int]:
    """The prompt without what it conditions on. Raises `SurgeryError` for a text: its tokens are not known here."""
    if isinstance(prompt, str) or not all(isinstance(part, int) for part in prompt):
        raise SurgeryError("The prompt without its condition is its last token, so that prompts are token ids here.",
                           hint='guidance(model, scale, unconditioned=lambda text: "...") for texts.')  # fmt: skip
    return list(prompt)[-1:]


@RULES.register("product")
def product(models: Sequence[Ensemble], weights: Sequence[float] | None = None) -> Ensemble:
    """A product of experts: sum_j w_j * model_j with weights that sum to 1 (equal ones by default)."""
    _members(*models)
    if not models:
        raise SurgeryError("A product of experts has one model or more.")
    factors = [1 / len(models)] * len(models) if weights is None else list(weights)
    _same_number(models, factors, "models", "weights")
    if any(w < 0 for w in factors) or abs(sum(factors) - 1) > 1e-6:
        raise SurgeryError(f"The weights of a product of experts are 0 or more and sum to 1, not {factors}.")
    found = factors[0] * models[0]
    for one, weight in zip(models[1:], factors[1:], strict=True):
        found = found + weight * one
    return found


@RULES.register("layers")
def layers(model: Ensemble, weights: Mapping[int, float], last: float = 1.0) -> Ensemble:
    """last * model + sum_j w_j * (layer j, read by the logit lens): an ensemble of one model's layers.

    In the spirit of LEVI (Roh et al. 2024, arXiv:2402.04644), which trains adapting layers on the intermediate states
    of a pre-trained and a small model. Nothing is trained here, so this is not LEVI: it has its idea that earlier
    layers hold other views, and no claim to its results.
    """
    _members(model)
    if len(model.terms) != 1 or not isinstance(weights, Mapping):
        raise SurgeryError("layers(model, {layer: weight}) is of one model.", hint="Sums of such can be added up.")
    one, found = model.base, last * model
    for layer, weight in weights.items():
        lens = replace(one, layer=layer)
        found = found + weight * Ensemble([(lens, 1.0)])
    return found


def _conservative(found: Ensemble, p: float, on: str, mode: Mode, base: Ensemble, tuned: Ensemble) -> Ensemble:
    seen = {"base": base, "tuned": tuned, "scores": "scores"}
    if on not in seen:
        raise SurgeryError(f"filter_on is 'base', 'tuned' or 'scores', and not {on!r}.")
    return found if p == 1 else found.filtered("nucleus", p, on=seen[on], mode=mode)


def _members(*models: object) -> None:
    """Raises `SurgeryError` for what is no member and no sum of members."""
    for one in models:
        if not isinstance(one, Ensemble):
            told = repr(one) if isinstance(one, str) else f"a {type(one).__name__}"
            raise SurgeryError(f"A rule takes models as `member` gives them, and not {told}.",
                               hint="member('name'), member(model, tokenizer).")  # fmt: skip


def _same_number(things: Sequence[object], others: Sequence[object], what: str, which: str) -> None:
    if len(things) != len(others):
        raise SurgeryError(f"There are {len(things)} {what} and {len(others)} {which}.")
