"""The policy: log-probabilities of given completions under a model (or a sum of models), cheaply and exactly.

Three things make a pass cheap. Only completion positions reach the head, and none that is padding. With a large
vocabulary the head works on chunks whose logits are made again in the backward pass. And a group's prompt goes through
the model once: its keys and values, with gradient, are shared by the completions. None of them changes the result
beyond float rounding, nor does the width of the padding on either side.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.decoding import CausalDecoder, Decoder, backbone_and_head
from surgery.decoding.cache import standard_cache
from surgery.errors import SurgeryError
from surgery.logits import Ensemble, Member
from surgery.models import cache_name
from surgery.training.batch import Batch

LOGITS = 1 << 24
"""Largest number of logits kept for the backward pass; beyond it they are computed in chunks, twice."""


@dataclass
class Scores:
    """What a pass over a batch gives; every tensor is (rows, completion, ...) and 0 in padding."""

    log_probs: Tensor
    """log softmax(logits / temperature) of each completion token, float32 (float64 for a float64 model)."""
    entropy: Tensor | None = None
    """Entropy (nats) of the distribution each token was drawn from."""
    hidden: Tensor | None = None
    """The last hidden state that predicts each token."""
    values: Tensor | None = None
    """What the value head says at the positions that predict each token."""


class Policy(nn.Module):
    """A causal language model as the distribution of completions.

    `backbones` are frozen models whose logits are added (UniR): then only `model` is trained, on the sum. `packing`
    puts several rows into one sequence, each attending to itself alone. It is the module that DDP and FSDP2 wrap:
    everything that computes with the parameters happens inside `forward`.
    """

    def __init__(
        self, model: nn.Module, backbones: Sequence[nn.Module] = (), *, share_prompts: bool = True, packing: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        check_vocabularies([model, *backbones])
        self.backbones = nn.ModuleList(backbones)
        self.extras = nn.ModuleDict()
        """More modules that an objective trains beside the model: a value head."""
        self.frozen = False
        """Whether nobody asks for gradients: of a reference."""
        self.share_prompts = share_prompts
        self.packing = packing
        self._split: dict[int, tuple[_Backbone, Callable[[Tensor], Tensor]]] = {}

    @property
    def members(self) -> list[nn.Module]:
        """The models whose logits are summed, the trained one first."""
        return [self.model, *self.backbones]

    def moving(self) -> list[nn.Parameter]:
        """The parameters that training moves: of the model and of what is trained beside it, never of backbones."""
        return [p for part in (self.model, self.extras) for p in part.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, batch: Batch, *, entropy: bool = False, hidden: bool = False, values: bool = False) -> Scores:
        """Scores of every completion token. Gradients flow to log-probs, entropy, hidden states and values alike."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = [self._states(self.model, batch)]
        for member in self.backbones:
            with torch.no_grad():
                states.append(self._states(member, batch))
        heads = [self._parts(self.model)[1], *(torch.no_grad()(self._parts(b)[1]) for b in self.backbones)]
        there = batch.attended
        everywhere = bool(there.all())  # then nothing is gathered, nor scattered in the backward pass

        def real(padded: Tensor) -> Tensor:
            return padded.flatten(0, 1) if everywhere else padded[there]

        def padded(flat: Tensor | None) -> Tensor | None:
            if flat is None or everywhere:
                return flat if flat is None else flat.view(there.shape)
            return flat.new_zeros(there.shape).masked_scatter(there, flat)

        targets = real(batch.completion_ids)
        log_probs, spread = token_log_probs([real(s) for s in states], heads, targets, batch.temperature, entropy)

        value = self.extras["value"](at_least_float32(states[0])).squeeze(-1) * there if values else None
        found = padded(log_probs)
        assert found is not None
        return Scores(found, padded(spread), states[0] if hidden else None, value)

    def decoder(self) -> Decoder:
        """What generates from this policy, one token at a time. Raises `SurgeryError` for models without a cache."""
        if not self.backbones:
            return CausalDecoder(self.model)
        return Ensemble([(Member(one, name=f"model {i}"), 1.0) for i, one in enumerate(self.members)])

    def snapshot(self) -> Policy:
        """A frozen copy of this very object as it is now, without dropout: the reference policy."""
        model = copy.deepcopy(self.model).requires_grad_(False).eval()
        found = Policy(model, list(self.backbones), share_prompts=self.share_prompts, packing=self.packing)
        found.frozen = True
        return found

    # ---- the pass

    def _parts(self, member: nn.Module) -> tuple[_Backbone, Callable[[Tensor], Tensor]]:
        """Hidden states from ids, and logits from hidden states; a model without that seam gives logits at once."""
        if id(member) not in self._split:
            found = backbone_and_head(member)
            self._split[id(member)] = (_Backbone(found[0]), found[1]) if found else (_Backbone(member), nn.Identity())
        return self._split[id(member)]

    def _states(self, member: nn.Module, batch: Batch) -> Tensor:
        """(rows, completion, d_model) the hidden states that predict the completion's tokens."""
        read = batch.completion_ids if batch.inputs is None else batch.inputs
        if batch.unseen is not None:
            return self._partly_seen(member, batch, read, batch.unseen)
        shares = batch.group > 1 and self.share_prompts and self._parts(member)[0].remembers
        if shares and not _checkpointing(member) and _full_attention(member, batch):
            return self._shared(member, batch, read)
        if self.packing and self._parts(member)[0].positions and _full_attention(member, batch):
            return self._packed(member, batch, read)
        ids = torch.cat([batch.prompt_ids, read[:, :-1]], 1)
        mask = torch.cat([batch.prompt_mask, batch.attended[:, :-1]], 1)
        return self._parts(member)[0](ids, mask)[:, batch.prompt_ids.shape[1] - 1 :]

    def _shared(self, member: nn.Module, batch: Batch, read: Tensor) -> Tensor:
        """Each group's prompt once, its keys and values repeated: the same states and gradients to float rounding."""
        from transformers import DynamicCache

        backbone, group = self._parts(member)[0], batch.group
        cache = DynamicCache()
        prompt_mask = batch.prompt_mask[::group]
        first = backbone(batch.prompt_ids[::group], prompt_mask, cache=cache)[:, -1:].repeat_interleave(group, 0)
        if read.shape[1] == 1:
            return first
        cache.batch_repeat_interleave(group)
        mask = torch.cat([batch.prompt_mask, batch.attended[:, :-1]], 1)
        return torch.cat([first, backbone(read[:, :-1], mask, cache=cache)], 1)

    def _partly_seen(self, member: nn.Module, batch: Batch, read: Tensor, unseen: Tensor) -> Tensor:
        """Every token at its place, yet nothing attends to those that are unseen, not even they themselves."""
        backbone = self._parts(member)[0]
        if not backbone.positions or not _full_attention(member, batch):
            raise SurgeryError("Tokens can be left out of attention only in models with full attention and positions.")
        ids = torch.cat([batch.prompt_ids, read[:, :-1]], 1)
        there = torch.cat([batch.prompt_mask, batch.attended[:, :-1]], 1)
        seen = torch.cat([batch.prompt_mask, (batch.attended & ~unseen)[:, :-1]], 1)
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        attention = seen[:, None, :] & torch.ones_like(itself).tril()
        attention = attention | (~there[:, :, None] & itself)  # padding sees itself, so that no softmax is empty
        positions = (there.long().cumsum(1) - 1).clamp(min=0)
        return backbone(ids, attention[:, None], positions=positions)[:, batch.prompt_ids.shape[1] - 1 :]

    def _packed(self, member: nn.Module, batch: Batch, read: Tensor) -> Tensor:
        """Rows laid end to end in bins of `packing` tokens, each row seeing itself alone and counting from 0."""
        there, prompt = batch.attended, batch.prompt_mask
        rows = [torch.cat([batch.prompt_ids[i][prompt[i]], read[i][there[i]][:-1]]) for i in range(len(batch))]
        bins = _bins([len(r) for r in rows], self.packing)
        width = max(sum(len(rows[i]) for i in members) for members in bins)
        ids = rows[0].new_zeros(len(bins), width)
        place = rows[0].new_full((len(bins), width), -1)  # which row a position belongs to
        count = rows[0].new_zeros(len(bins), width)
        starts = {}
        for b, members in enumerate(bins):
            at = 0
            for i in members:
                end = at + len(rows[i])
                ids[b, at:end], place[b, at:end] = rows[i], i
                count[b, at:end] = torch.arange(len(rows[i]), device=ids.device)
                starts[i], at = (b, at), end
        own = (place[:, :, None] == place[:, None, :]) & (count[:, :, None] >= count[:, None, :])
        own |= torch.eye(width, dtype=torch.bool, device=ids.device) & (place < 0)[:, :, None]
        states = self._parts(member)[0](ids, own[:, None], positions=count)
        out = states.new_zeros(*there.shape, states.shape[-1])
        for i, (b, at) in starts.items():
            first, length = at + int(prompt[i].sum()) - 1, int(batch.lengths[i])
            out[i, :length] = states[b, first : first + length]
        return out


class _Backbone:
    """Calls a decoder stack with what its family takes: a mask only where something is masked, explicit positions."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        accepted = inspect.signature(module.forward).parameters
        self.positions = "position_ids" in accepted
        config: Any = getattr(module, "config", None)
        self._cache_name = cache_name(module)
        self.remembers = config is not None and self._cache_name is not None and standard_cache(config)
        """Whether keys and values are all that it remembers of a prompt: then a group can share them."""

    def __call__(self, ids: Tensor, mask: Tensor, *, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        """(rows, pos, d_model) for `ids`; `mask` is (rows, pos with the cache), or (rows, 1, pos, pos) as it is."""
        more: dict[str, Any] = {self._cache_name or "past_key_values": cache, "use_cache": cache is not None}
        if mask.dim() == 4:
            more["attention_mask"] = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(
                ~mask, -torch.inf
            )
        elif not mask.all():
            more["attention_mask"] = mask.long()
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if positions is not None and self.positions:
            more["position_ids"] = positions
        out = self.module(input_ids=ids, **more)
        return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype


def token_log_probs(
    states: Sequence[Tensor],
    heads: Sequence[Callable[[Tensor], Tensor]],
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (tokens,) of `targets` under softmax(sum of head(state) / temperature), and their entropies.

    `states` are (tokens, d_model), one for each head. Float32 for narrower storage.
    """

    def part(targets: Tensor, *states: Tensor) -> Tensor:
        logits = at_least_float32(heads[0](states[0]))
        for head, state in zip(heads[1:], states[1:], strict=True):
            logits = logits + at_least_float32(head(state))
        if temperature != 1.0:
            logits = logits / temperature
        if not entropy:
            return -nn.functional.cross_entropy(logits, targets, reduction="none")[None]
        log = logits.log_softmax(-1)
        return torch.stack([log.gather(-1, targets[:, None])[:, 0], -(log.exp() * log).sum(-1)])

    if not len(targets):
        none = (at_least_float32(states[0]).sum() * 0).expand(0)
        return none, none if entropy else None
    with torch.no_grad():
        vocabulary = heads[0](states[0][:1]).shape[-1]
    rows = max(1, LOGITS // 4 // vocabulary)
    if len(targets) * vocabulary <= LOGITS:
        found = part(targets, *states)
    elif not torch.is_grad_enabled():
        cuts = range(0, len(targets), rows)
        found = torch.cat([part(targets[i : i + rows], *(s[i : i + rows] for s in states)) for i in cuts], 1)
    else:
        from torch.utils.checkpoint import checkpoint

        parts = [
            checkpoint(part, targets[i : i + rows], *(s[i : i + rows] for s in states), use_reentrant=False)
            for i in range(0, len(targets), rows)
        ]
        found = torch.cat(parts, 1)
    return found[0], found[1] if entropy else None


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Training mode with every dropout at 0; rates and modes are as before afterwards.

    The same mode for old and new log-probabilities, yet gradient checkpointing, which needs training mode, works.
    """
    modes = [(m, m.training) for m in module.modules()]
    rates: list[tuple[Any, str, float]] = []
    for m in module.modules():
        for name in ("p", "attention_dropout", "dropout", "attn_dropout", "hidden_dropout", "activation_dropout"):
            rate = getattr(m, name, None)
            if isinstance(rate, float) and rate > 0 and (name != "p" or isinstance(m, nn.modules.dropout._DropoutNd)):
                rates.append((m, name, rate))
                setattr(m, name, 0.0)
    try:
        module.train()
        yield
    finally:
        for m, name, rate in rates:
            setattr(m, name, rate)
        for m, training in modes:
            m.training = training


def _checkpointing(member: nn.Module) -> bool:
    return member.training and checkpoints_activations(member) and torch.is_grad_enabled()


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on: whether any layer has the flag."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def _full_attention(member: nn.Module, batch: Batch) -> bool:
    """Whether no sliding window is narrower than the rows: a shared cache then holds all that a token may see."""
    config: Any = getattr(member, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(config, "sliding_window", None)
    return window is None or batch.prompt_ids.shape[1] + batch.completion_ids.shape[1] <= window


def _bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """First-fit decreasing: indices of rows, by bin; a row longer than `size` has a bin of its own."""
    bins: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, (used, members) in enumerate(bins):
            if used + lengths[i] <= size:
                bins[b] = (used + lengths[i], [*members, i])
                break
        else:
            bins.append((lengths[i], [i]))
    return [members for _, members in bins]


def check_vocabularies(models: Sequence[nn.Module]) -> None:
    """Raises `SurgeryError` when the models' logits can't be added."""
    sizes = [_vocabulary(model) for model in models]
    if len({size for size in sizes if size}) > 1:
        raise SurgeryError(
            f"Logits of vocabularies of {' and '.join(map(str, sizes))} tokens can't be added.",
            hint="The model and its backbones must share one tokenizer and one size of vocabulary.",
        )


def _vocabulary(model: Any) -> int | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None or not hasattr(head, "weight") else head.weight.shape[0]
