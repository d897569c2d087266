"""What is new in the data of a fine-tuning, read off its two ends: contrastive generative exploration (CGE).

Texts are drawn from softmax(log p_tuned - gamma log p_base) over the tokens that are plausible for the tuned model,
from BOS alone, by beam sampling (Isonuma & Titov, "What's New in My Data?", ICLR 2025, arXiv:2410.14765). With
`iterative`, a copy of the base learns each text before the next one is drawn: what was shown is new no more.

    found = explore("base", "tuned", n=100, iterative=True)
    found.texts[0].text, found.texts[0].contrast
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.decoding import Sampling, beam_search, decode, undisturbed, uniforms
from surgery.decoding.beam import NotFiniteError
from surgery.decoding.cache import ROOM
from surgery.errors import SurgeryError
from surgery.logits import rules
from surgery.logits.contrasts import Contrasted, Model, difference, first_ids, told
from surgery.logits.ensemble import Ensemble
from surgery.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 256
"""Tokens of a text in the paper."""
CLIP = 1.0
"""Largest norm of a gradient; the released code's."""
OPTIMIZERS: Registry[Callable[[Any, float], torch.optim.Optimizer]] = Registry("optimizer")
OPTIMIZERS.register("adamw")(lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=0.0))
OPTIMIZERS.register("sgd")(lambda parameters, lr: torch.optim.SGD(parameters, lr))
OPTIMIZERS.register("rmsprop")(lambda parameters, lr: torch.optim.RMSprop(parameters, lr))


@dataclass(frozen=True)
class Exploration:
    """Texts in the order in which they were drawn; their contrast is to the base as it was given."""

    texts: list[Contrasted]
    start: list[int]
    """What every text begins behind."""
    settings: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    """Ctrl-C came before all texts were there."""

    @property
    def losses(self) -> list[float]:
        """Of an iterative exploration: the base's loss of each text before it learned it."""
        return [one.loss for one in self.texts if one.loss is not None]

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON, making the folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Exploration:
        """Reads what `save` wrote. Raises `SurgeryError` for a file that is none."""
        try:
            words = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**words, "texts": [Contrasted(**one) for one in words["texts"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SurgeryError(f"{path} is no exploration that was saved: {error}.") from error


def explore(
    base: Model,
    tuned: Model,
    *,
    n: int = 100,
    length: int | None = None,
    gamma: float = 1.0,
    alpha: float = 0.1,
    beams: int = 4,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    ends: bool = False,
    iterative: bool = False,
    lr: float = 5e-5,
    optimizer: str = "adamw",
    seed: int = 0,
    start: str | int | Sequence[int] | None = None,
    batch_size: int = 32,
    allow_unconstrained: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exploration:
    """`n` texts of `length` tokens (None: 256, or what fits) that show what the tuned model has and the base lacks.

    Scores are as in `rules.cge`; as in the released code beams are ranked by their sum, not by log-probabilities, so
    that a beam of high contrast stays. One beam is plain sampling. Text i is drawn with noise of (`seed`, i) alone.
    Texts begin behind `start` (default: BOS) and have full length, end tokens being tokens as others are; with `ends`
    they end there. `batch_size` rows, beams counted, are decoded at a time where the base stays as it is.

    `iterative`: after each text one step of `optimizer` on the language-model loss of the text, on a float32 copy of
    the base in evaluation mode; the base is left as it is. As in the released code: one text a step, a constant rate
    from the first step on, gradients clipped to norm 1, no weight decay. Its rate is 5e-5, for billions of parameters;
    models of a million want some 1e-3 to 3e-4.

    Ctrl-C ends it early with the texts that are there. `progress` is called with (texts done, n). Raises `SurgeryError`
    for alpha 0 without `allow_unconstrained`, texts that don't fit into a context, a tokenizer without BOS and no
    `start`, equal texts (temperature 0 and a base that stays), and a rate at which the copy breaks.
    """
    make = OPTIMIZERS.lookup(optimizer)
    _check(n, length, beams, lr, temperature, iterative, batch_size)
    pair = difference(base, tuned, tokenizer)
    after, before = (Ensemble([(replace(one, prompt="given"), 1.0)]) for one in pair.members)
    pair = after - before
    first = first_ids(pair.tokenizer, start)
    sampling = Sampling(_length(pair, len(first), length), temperature, top_p, top_k, batch_size=batch_size)
    against = _copied(before) if iterative else before
    contrast = rules.cge(after, against, gamma, alpha, allow_unconstrained=allow_unconstrained)
    step = _learner(after - against, against.base.model, first, make, lr) if iterative else None
    stops = contrast.ends if ends else set()
    texts: list[Contrasted] = []
    at_once = 1 if iterative else max(1, batch_size // beams)
    interrupted = False
    while len(texts) < n and not interrupted:
        begin = len(texts)
        seeds = [(seed << 32) + i for i in range(begin, min(begin + at_once, n))]
        try:
            drawn, interrupted = _drawn(contrast, first, seeds, beams, sampling, stops)
        except NotFiniteError as error:
            if step is None or not texts:
                raise
            raise SurgeryError(f"After {begin} steps the copy of the base says nothing that is a number.",
                               hint=f"Lower the learning rate: it is {lr:g}.") from error  # fmt: skip
        try:
            try:
                read = told(pair, [first] * len(drawn), drawn, batch_size)
            except KeyboardInterrupt:  # it costs little beside drawing
                interrupted, read = True, told(pair, [first] * len(drawn), drawn, batch_size)
            for one in read:
                loss = None if step is None else step(one.ids)
                texts.append(_scored(one, gamma, loss))
        except KeyboardInterrupt:
            interrupted = True
        if progress is not None:
            progress(len(texts), n)
    names = [pair.name_of(one) for one in pair.members]
    settings = {
        "tuned": names[0], "base": names[1], "n": n, "length": sampling.max_new_tokens, "gamma": gamma, "alpha": alpha,
        "beams": beams, "temperature": temperature, "top_k": top_k, "top_p": top_p, "ends": ends,
        "iterative": iterative, **({"lr": lr, "optimizer": optimizer} if iterative else {}), "seed": seed,
    }  # fmt: skip
    return Exploration(texts, first, settings, interrupted)


def _drawn(
    contrast: Ensemble, first: Sequence[int], seeds: Sequence[int], beams: int, sampling: Sampling, ends: set[int]
) -> tuple[list[list[int]], bool]:
    """The tokens of one text a seed, and whether Ctrl-C cut them short (those without tokens are left out)."""
    found: dict[int, list[int]] = {}
    contrast.room = min(sampling.max_new_tokens, ROOM)
    try:
        with undisturbed(*contrast.models):
            logits, state = contrast.prefill_encoded([contrast.encode(list(first))])
            same = torch.zeros(len(seeds), dtype=torch.long, device=logits.device)
            begun = logits[same], state.select(same)
            if beams == 1:
                noise = torch.from_numpy(uniforms(seeds, 1, sampling.max_new_tokens))[:, 0].to(logits.device)
                for row, (ids, log_probs) in decode(contrast, *begun, noise, sampling, ends):
                    if not math.isfinite(sum(log_probs)):
                        raise NotFiniteError(row, [math.isfinite(value) for value in log_probs].index(False), state)
                    found[row] = ids
            else:
                for row, best in beam_search(
                    contrast, *begun, beams=beams, max_new_tokens=sampling.max_new_tokens, ends=ends,
                    sampling=sampling, seeds=seeds, normalise=False,
                ):  # fmt: skip
                    found[row] = best[0].tokens if best else []
    except KeyboardInterrupt:
        return [found[row] for row in sorted(found) if found[row]], True
    return [found[row] for row in sorted(found)], False


def _scored(one: Contrasted, gamma: float, loss: float | None) -> Contrasted:
    """With the mean of what it was drawn by, the base being as it was then."""
    mean = math.fsum(one.tuned) / len(one.tuned)
    return replace(one, score=mean - gamma * (mean - one.novelty if loss is None else -loss), loss=loss)


def _copied(before: Ensemble) -> Ensemble:
    """The base's model once more, in float32: in half precision small steps would be rounded away."""
    one = before.base
    model = copy.deepcopy(one.model).float().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return Ensemble([(replace(one, model=model, decoders={}), 1.0)])


def _learner(
    pair: Ensemble, model: Any, first: Sequence[int], make: Callable[..., Any], lr: float
) -> Callable[[list[int]], float]:
    """A step of `model`, the base of `pair`, on a text (ids of the tuned model); returns the loss before it."""
    reader = next(r for r in pair.readers if r.members[0].model is model)
    begin = reader.encode(first, pair.base.tokenizer)[0]
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr)
    device = next(model.parameters()).device

    def step(ids: list[int]) -> float:
        assert reader.map is not None
        own = reader.map.feed(torch.tensor(ids)).tolist()
        row = torch.tensor([[*begin, *own]], device=device)
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad(), reader.members[0].speaking():
            logits: Tensor = model(input_ids=row, use_cache=False).logits[0, len(begin) - 1 : -1]
            loss = nn.functional.cross_entropy(reader.values(logits), torch.tensor(ids, device=device))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def _length(pair: Ensemble, before: int, length: int | None) -> int:
    """Tokens of a text: as many as asked for, or the paper's where they fit."""
    room = LENGTH if pair.context is None else pair.context - before
    if room < 1 or (length is not None and pair.context is not None and length > room):
        raise SurgeryError(f"Texts of {length or LENGTH} tokens behind {before} don't fit into the models' context of "
                           f"{pair.context}.", hint="Lower length.")  # fmt: skip
    return min(LENGTH, room) if length is None else length


def _check(
    n: int, length: int | None, beams: int, lr: float, temperature: float, iterative: bool, batch_size: int
) -> None:
    for name, value, right, expected in (
        ("n", n, n >= 1, "at least 1"),
        ("length", length, length is None or length >= 1, "at least 1"),
        ("beams", beams, beams >= 1, "at least 1"),
        ("lr", lr, not iterative or 0 < lr < math.inf, "above 0"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not right:
            raise SurgeryError(f"explore: {name} is {value!r}; expected {expected}.")
    if temperature == 0 and not iterative and n > 1:
        raise SurgeryError(f"At temperature 0 and with a base that stays as it is, all {n} texts are the same.",
                           hint="Raise the temperature, or let the base learn: iterative=True.")  # fmt: skip
