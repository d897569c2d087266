"""Ensembles inside transformers' own `generate`: as its decoding loop, or as one of its logits processors.

    large.generate(**inputs, custom_generate=as_generate(ensemble), max_new_tokens=64, streamer=TextStreamer(tokenizer))
    large.generate(**inputs, logits_processor=[EnsembleLogitsProcessor(ensemble, large)], num_beams=4)

`large` is the model of the ensemble's base: whose token ids they are, and whose generation config ends a text. The
first way is the faster one, for greedy decoding and sampling; the second works with every decoding method that asks
its processors for one token a row, beam search and assisted generation among them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.decoding import undisturbed
from surgery.decoding.head import unwrapped
from surgery.errors import SurgeryError
from surgery.logits.combine import normalised
from surgery.logits.ensemble import Ensemble
from surgery.logits.lockstep import EnsembleState, Reader

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Ids = tuple[int, ...]


def as_generate(ensemble: Ensemble) -> Callable[..., Any]:
    """What `generate(custom_generate=...)` of the base's model takes: the loop of `_sample`, the ensemble's scores.

    Logits processors, warpers, stopping criteria, streamers, `num_return_sequences`, `output_scores` and
    `output_logits` do what they do there (5.24); sampling draws from torch's global generator. Stop strings come as a
    `StopStringCriteria`: `generate` loses its `tokenizer` where a callable decodes. Other members' ends are no
    ends here, unless given: `eos_token_id=sorted(ensemble.ends)`.

    When called raises `SurgeryError` for a model that is not the base's, for beams, for attentions or hidden states,
    for texts over a member's context, and for scores that are no numbers.
    """
    _check_kind(ensemble)

    def decode(
        model: nn.Module,
        input_ids: Int[Tensor, "row pos"],
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        _check_base(ensemble, model)
        _check_config(generation_config, model_kwargs)
        streamer = streamer or _streamer_of(sys._getframe(1))
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        with undisturbed(*ensemble.models):
            begun = _begun(ensemble, prompts, generation_config.max_length - input_ids.shape[1], input_ids.device)
            rows = _sampled(
                ensemble, begun, input_ids, logits_processor, stopping_criteria, generation_config, streamer, kept
            )
        return _told(rows, kept, generation_config)

    return decode


class EnsembleLogitsProcessor:
    """A logits processor of transformers that makes the scores of the model being decoded those of a composition.

    That model's share are the scores that come in; the other members read the same prompts, each in its own way, and
    the tokens as they come, with caches of their own that follow the rows wherever beam search takes them. What comes
    out is normalised, so that beams add it up. Processors before it in the list act on the base alone.

    `mask` is the attention mask of the prompts; without it tokens at the start that are the padding token, and no end
    of sequence, are taken for padding. Make one for each call of `generate`. Raises `SurgeryError` for a model that is
    not the base's, for a base that reads its prompt in another way, and, when called, for texts over a member's
    context and for scores that are no numbers.
    """

    def __init__(self, ensemble: Ensemble, model: nn.Module, mask: Int[Tensor, "row pos"] | None = None) -> None:
        _check_base(ensemble, model)
        base = ensemble.base
        if base.layer is not None or base.adapter is not None or base.prompt not in ("given", "plain"):
            raise SurgeryError(
                f"The base '{base.name}' does not say what its model says of these token ids: it has a prompt of its "
                "own, or speaks from an earlier layer or with a named adapter.",
                hint="A base with the prompt 'given', or custom_generate=as_generate(ensemble).",
            )
        self.ensemble, self._mask = ensemble, mask
        self._own, self._main = _main(ensemble)
        self._others = _without(ensemble.readers, self._own)
        self._padding = _padding(ensemble, model)
        self._ids: Tensor | None = None
        self._state: EnsembleState
        self._prompt_of: Tensor
        self._lengths: list[int] = []
        self._start = 0

    def __call__(self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row own"]) -> Tensor:
        """The composition's log-probabilities, -inf where the base has tokens that nobody can reach."""
        values = {self._own: self._main.values(scores)}
        if self._others:
            with undisturbed(*(reader.members[0].model for reader in self._others)):
                told = self._follow(input_ids)
            for reader, logits in zip(self._others, told, strict=True):
                values |= {at: reader.values(one[:, -1]) for at, one in zip(reader.index, logits, strict=True)}
        log_probs = [values[at].to(scores.device).log_softmax(-1) for at in range(len(self.ensemble.terms))]
        out = normalised(self.ensemble.combined(log_probs))
        _check_numbers(self.ensemble, out, log_probs)
        return _wide(out, scores.shape[1]).to(scores.dtype)

    def _follow(self, ids: Tensor) -> list[list[Tensor]]:
        """By reader and member, logits after the last token of each row; what was read before is not read again."""
        if (parents := self._parents(ids)) is not None:
            if not torch.equal(parents, torch.arange(len(ids), device=ids.device)):
                self._state = self._state.select(parents)
            return self._read(ids, ids.shape[1] - 1)
        if not self._taken_back(ids):
            self._start = ids.shape[1]
        told = self._prefill(ids[:, : self._start])
        return told if self._start == ids.shape[1] else self._read(ids, self._start)

    def _parents(self, ids: Tensor) -> Tensor | None:
        """Which row each row goes on from by one token; None when one has no such row."""
        old = self._ids
        if old is None or ids.shape != (len(old), old.shape[1] + 1):
            return None
        if torch.equal(ids[:, :-1], old):
            return torch.arange(len(ids), device=ids.device)
        same = (ids[:, None, :-1] == old).all(-1) & (self._prompt_of[:, None] == self._prompt_of)
        return same.int().argmax(1) if bool(same.any(1).all()) else None

    def _taken_back(self, ids: Tensor) -> bool:
        """Whether these are prompts that were read, with another continuation: assisted generation drops tokens."""
        old, start = self._ids, self._start
        if old is None or len(old) != len(ids) or not start < ids.shape[1] <= old.shape[1]:
            return False
        return torch.equal(ids[:, :start], old[:, :start])

    def _prefill(self, ids: Tensor) -> list[list[Tensor]]:
        mask = self._mask
        if mask is None:
            mask = (ids != self._padding).cumsum(1) > 0 if self._padding is not None else torch.ones_like(ids)
        prompts = _prompts(ids, mask)
        unique, index = _unique(prompts, ids.device)
        tokenizer = self.ensemble.base.tokenizer
        rows = [[reader.encode(prompt, tokenizer) for prompt in unique] for reader in self._others]
        self._lengths = [_longest(reader, views) for reader, views in zip(self._others, rows, strict=True)]
        found = [reader.prefill(views) for reader, views in zip(self._others, rows, strict=True)]
        views = [len(reader.styles) for reader in self._others]
        self._state = EnsembleState([state for _, state in found], views, len(unique)).select(index)
        self._ids, self._prompt_of = ids.clone(), index
        return [[one[index.to(one.device)] for one in told] for told, _ in found]

    def _read(self, ids: Tensor, start: int) -> list[list[Tensor]]:
        new = ids[:, start:]
        for reader, length in zip(self._others, self._lengths, strict=True):
            _check_room(reader, length, ids.shape[1] - self._start)
        tokens = new.where(new < self.ensemble.vocabulary, 0)  # rows that have ended are padded with anything
        told = [reader.read(tokens, part) for reader, part in zip(self._others, self._state.parts, strict=True)]
        self._ids = ids.clone()
        return told


def _sampled(
    ensemble: Ensemble,
    begun: tuple[Tensor, EnsembleState],
    ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    streamer: Any,
    kept: tuple[list[Tensor], list[Tensor]],
) -> Tensor:
    """Token after token as transformers' `_sample`; `kept` takes the logits and the scores that are asked for."""
    scores, state = begun
    columns = _main(ensemble)[1].rows_of_weights
    going = torch.ones(len(ids), dtype=torch.long, device=ids.device)
    padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    told = kept[1] if config.return_dict_in_generate and config.output_scores else None
    while True:
        _check_numbers(ensemble, scores, state.log_probs)
        logits = _wide(scores, columns).to(ids.device, copy=True)
        processed = logits_processor(ids, logits)
        if config.return_dict_in_generate and config.output_logits:
            kept[0].append(logits)
        if told is not None:
            told.append(processed)
        if config.do_sample:
            tokens = torch.multinomial(processed.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = processed.argmax(-1)
        if padded:
            tokens = tokens * going + config._pad_token_tensor.to(ids.device) * (1 - going)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        going = going & ~stopping_criteria(ids, None if told is None else tuple(told))
        if not bool(going.any()):
            break
        scores, state = ensemble.step(tokens.where(tokens < ensemble.vocabulary, 0), state)
    if streamer is not None:
        streamer.end()
    return ids


def _told(ids: Tensor, kept: tuple[list[Tensor], list[Tensor]], config: Any) -> Any:
    from transformers.generation import GenerateDecoderOnlyOutput

    if not config.return_dict_in_generate:
        return ids
    logits, scores = kept
    return GenerateDecoderOnlyOutput(
        sequences=ids,  # type: ignore[arg-type]
        scores=tuple(scores) if config.output_scores else None,  # type: ignore[arg-type]
        logits=tuple(logits) if config.output_logits else None,  # type: ignore[arg-type]
    )


def _begun(ensemble: Ensemble, prompts: Sequence[Ids], new: int, device: torch.device) -> tuple[Tensor, EnsembleState]:
    """Scores and state behind the prompts, each different one read once."""
    unique, index = _unique(prompts, device)
    rows = [ensemble.encode(prompt) for prompt in unique]
    for i, reader in enumerate(ensemble.readers):
        _check_room(reader, _longest(reader, [row[i] for row in rows]), new)
    scores, state = ensemble.prefill_encoded(rows)
    return (scores, state) if len(unique) == len(prompts) else (scores[index.to(scores.device)], state.select(index))


def _unique(prompts: Sequence[Ids], device: torch.device) -> tuple[list[Ids], Tensor]:
    """The different prompts, and which of them each row has."""
    unique = list(dict.fromkeys(prompts))
    places = {prompt: i for i, prompt in enumerate(unique)}
    return unique, torch.tensor([places[prompt] for prompt in prompts], device=device)


def _prompts(ids: Tensor, mask: Tensor | None) -> list[Ids]:
    """Each row's tokens without padding. A row of `mask` stands for as many rows of `ids` as there are to each."""
    if mask is None:
        return [tuple(row) for row in ids.tolist()]
    if mask.shape[1] != ids.shape[1] or len(ids) % len(mask):
        raise SurgeryError(f"The mask is for prompts of shape {tuple(mask.shape)}, and these are {tuple(ids.shape)}.")
    mask = mask.to(ids.device).repeat_interleave(len(ids) // len(mask), dim=0).bool()
    return [tuple(row[there].tolist()) for row, there in zip(ids, mask, strict=True)]


def _padding(ensemble: Ensemble, model: Any) -> int | None:
    """The padding token, where it is told apart from an end of sequence (as `generate` itself takes it)."""
    named = model.generation_config.pad_token_id, getattr(ensemble.base.tokenizer, "pad_token_id", None)
    token = next((one for one in named if one is not None), None)
    return None if token in ensemble.ends else token


def _main(ensemble: Ensemble) -> tuple[int, Reader]:
    """The base's place and its reader."""
    at = next(i for i, one in enumerate(ensemble.members) if one.key == ensemble.base.key)
    return at, next(reader for reader in ensemble.readers if at in reader.index)


def _without(readers: Sequence[Reader], own: int) -> list[Reader]:
    """Readers of all members but one."""
    found = []
    for reader in readers:
        index = [at for at in reader.index if at != own]
        if index:
            members = [one for one, at in zip(reader.members, reader.index, strict=True) if at != own]
            found.append(Reader(members, index, whole=False))
            found[-1].map, found[-1].decoder = reader.map, reader.decoder
    return found


def _wide(scores: Tensor, columns: int) -> Tensor:
    """With a column for every row of the base's embedding: processors may count on them."""
    return nn.functional.pad(scores, (0, columns - scores.shape[1]), value=-torch.inf)


def _longest(reader: Reader, rows: Sequence[Sequence[Sequence[int]]]) -> int:
    """Tokens of the longest prompt that a reader reads. Raises `SurgeryError` when it reads nothing of one."""
    lengths = [len(ids) for views in rows for ids in views]
    if min(lengths) == 0:
        raise SurgeryError(f"A prompt is empty for '{reader.members[0].name}'.", hint="Begin with a token: its BOS.")
    return max(lengths)


def _check_room(reader: Reader, length: int, new: int) -> None:
    context = reader.decoder.context
    if context is not None and length + new > context:
        raise SurgeryError(
            f"A prompt of {length} tokens and {new} new ones don't fit into the context of "
            f"'{reader.members[0].name}', {context}.",
            hint="Shorten the prompts or lower max_new_tokens.",
        )


def _check_kind(ensemble: Any) -> None:
    if not isinstance(ensemble, Ensemble):
        raise SurgeryError(f"A {type(ensemble).__name__} is no ensemble.",
                           hint="as_generate(ensemble), EnsembleLogitsProcessor(ensemble, model).")  # fmt: skip


def _check_base(ensemble: Ensemble, model: nn.Module) -> None:
    _check_kind(ensemble)
    if unwrapped(model) is not unwrapped(ensemble.base.model):
        raise SurgeryError(
            f"The model that generates is not that of '{ensemble.base.name}', the base of this ensemble: token ids, "
            "and what ends a text, are the base's.",
            hint="Call generate of the base's model, or make its member the base: ensemble.based_on(...).",
        )


def _check_config(config: Any, model_kwargs: dict[str, Any]) -> None:
    if config.num_beams > 1:
        raise SurgeryError(
            f"A custom_generate decodes row by row, and num_beams is {config.num_beams}.",
            hint="logits_processor=[EnsembleLogitsProcessor(ensemble, model)] has beams, and so has "
            "surgery.logits.generate(..., beams=...).",
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise SurgeryError("An ensemble of models has no attentions or hidden states to return.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise SurgeryError("Members read token ids, each with its own embedding: inputs_embeds are the base's alone.")


def _check_numbers(ensemble: Ensemble, scores: Tensor, log_probs: Sequence[Tensor]) -> None:
    if bool(scores.amax(-1).isfinite().all()):
        return
    wrong = [one for one, said in zip(ensemble.members, log_probs, strict=True) if bool(said.isnan().any())]
    if wrong:
        raise SurgeryError(f"The logits of '{ensemble.name_of(wrong[0])}' are not numbers.")
    raise SurgeryError("The composition forbids every token: by the base's own logits, or by what members lack.")


def _streamer_of(caller: Any) -> Any:
    """The streamer that `generate` was given: it hands a callable everything else, and its own frame holds it."""
    return caller.f_locals.get("streamer") if caller.f_code.co_name == "generate" else None
