"""A LoRA on a base, read row by row as if it were merged; the merged model is never written nor held.

    W' = W + s B A          s = alpha / r, or alpha / sqrt(r) with rsLoRA           (LoRA, arXiv:2106.09685; 2312.03732)
    W' = m (W + s B A) / ||W + s B A||, a norm and an m for each output             (DoRA, arXiv:2402.09353)

What PEFT computes while the adapter is *switched on* is the measure, also for tied embeddings: an adapter on one side
of a tie makes a model that is no longer tied, so the head gets a tensor of its own and the config says so. (PEFT's
`merge_and_unload` writes through the shared weight there, and so changes the other side as well.)
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.header import TensorInfo, torch_dtype
from surgery.checkpoint.reader import Source, open_checkpoint, read_json
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG = "adapter_config.json"
BLOCK_ROWS = 64
"""Products are taken over the same blocks of rows always: the bits must not depend on which rows are asked for."""

HEADS = {"embed_tokens": "lm_head", "wte": "lm_head", "word_embeddings": "lm_head", "embed_in": "embed_out"}
"""The output head that can be tied to an embedding, by the last names of their modules."""

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types that store matrices as (in, out); asked only where a square matrix does not tell by itself."""

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|base_layer|"
    r"modules_to_save)(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_FOREIGN = re.compile(r"\.(lora_|token_adapter|trainable_tokens|ia3_|oft_|hada_|lokr_|vera_|boft_)")
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that take the start of B A out of the base: such an adapter fits that changed base only."""


@dataclass(frozen=True, eq=False)
class Target:
    """What an adapter does to one tensor of `shape`: `replaced` stands in for it, `scale * left @ right` is added.

    `left` is (rows, r) and `right` (r, cols) in the orientation in which the base stores the tensor. `magnitude` is
    DoRA's: a number for each row, or for each column when `transposed`.
    """

    shape: tuple[int, ...]
    replaced: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 1.0
    magnitude: Tensor | None = None
    transposed: bool = False

    @property
    def additive(self) -> bool:
        """Whether the change is the same whatever the base."""
        return self.replaced is None and self.magnitude is None

    def add(self, rows: Tensor, start: int) -> Tensor:
        """`rows` (float32 or 64; rows `start:` of the tensor) with the low-rank part added; DoRA's norm not yet."""
        if self.left is None or self.right is None:
            return rows
        left = self.left[start : start + len(rows)].to(rows.dtype)
        flat = rows.reshape(len(rows), -1)
        return flat.addmm(left, self.right.to(rows.dtype), alpha=self.scale).view(rows.shape)


class Adapter:
    """A PEFT LoRA or DoRA folder; `targets` maps the names of the base's tensors to what happens to them.

    Names, shapes and orientation follow `base` when it is given; without it they are those of the adapter's file.
    Raises `SurgeryError` for other kinds of adapters and for an adapter of another base.
    """

    def __init__(self, folder: str | Path, base: Source | None = None, *, allow_pickle: bool = False) -> None:
        self.path = Path(folder)
        self.config = _read_config(self.path)
        self.targets: dict[str, Target] = {}
        self._base = base
        self._tie = tied_pair(base) if base is not None else None
        for module, parts in _read_parts(self.path, allow_pickle).items():
            for leaf in sorted({part.rpartition(".")[2] for part in parts}):
                self._add(module, leaf, parts)

    def delta(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of what is added to tensor `name`, float32.

        Raises `SurgeryError` for a tensor that is not touched, and for one whose change depends on the base (DoRA,
        replaced tensors): there, subtract the base from `AdaptedCheckpoint.read`.
        """
        import torch

        target = self.targets.get(name)
        if target is None or not target.additive:
            why = "does not touch" if target is None else "has no fixed difference (it is replaced or rescaled) for"
            raise SurgeryError(f"{self.path} {why} tensor '{name}'.")

        def block(i: int, j: int) -> Tensor:
            return target.add(torch.zeros(j - i, *target.shape[1:]), i)

        return _rows(target.shape, start, stop, torch.float32, block)

    def _add(self, module: str, leaf: str, parts: dict[str, Tensor]) -> None:
        """Turns the stored parts of `module` into the target for its `leaf`, weight or bias."""
        name, base_shape = self._find(f"{module}.{leaf}")
        replaced, magnitude, transposed = parts.get(f"base.{leaf}"), None, False
        shape = base_shape if replaced is None else tuple(replaced.shape)
        left = right = None
        rank, scale = self._rank_and_scale(module)
        if leaf == "bias" and "B.bias" in parts:
            left = parts["B.bias"].view(-1, 1)
            right = left.new_ones(1, 1)
        elif leaf == "weight" and {"A.weight", "B.weight", "magnitude.weight"} & parts.keys():
            if not {"A.weight", "B.weight"} <= parts.keys():
                raise SurgeryError(f"{self.path}: of the two matrices of '{module}' one is missing.")
            a, b, magnitude = parts["A.weight"], parts["B.weight"], parts.get("magnitude.weight")
            if min(a.ndim, b.ndim) < 2 or a.shape[0] != rank or math.prod(b.shape[1:]) != rank:
                found = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
                raise SurgeryError(f"{self.path}: '{module}' should have rank {rank} by {CONFIG}; found {found}.")
            a, b = a.reshape(rank, -1), b.reshape(-1, rank)
            transposed = "embedding.weight" in parts or self._is_transposed((len(b), a.shape[1]), shape)
            left, right = (a.T, b.T) if transposed else (b, a)
        given = (len(left), right.shape[1]) if left is not None and right is not None else None
        if shape is None:
            if given is None:
                raise SurgeryError(f"{self.path}: there is nothing to add to '{name}'.")
            shape = given if leaf == "weight" else given[:1]
        resizes = module.rpartition(".")[2] in {*HEADS, *HEADS.values()}
        unlike = base_shape is not None and (shape[1:] != base_shape[1:] or (shape != base_shape and not resizes))
        if unlike or (given is not None and given != (shape[0], math.prod(shape[1:]))):
            raise SurgeryError(
                f"{self.path} was made for another base: '{name}' is {base_shape} there, {given or shape} here.",
                hint=f"The adapter's own record of its base is {self.config.get('base_model_name_or_path')!r}.",
            )
        if magnitude is not None and magnitude.numel() != shape[1 if transposed else 0]:
            raise SurgeryError(f"{self.path}: {magnitude.numel()} magnitudes do not fit '{name}' of shape {shape}.")
        self.targets[name] = Target(shape, replaced, left, right, scale, magnitude, transposed)

    def _find(self, name: str) -> tuple[str, tuple[int, ...] | None]:
        """The base's own name and shape for the adapter's `name`: some checkpoints lack, or add, a common prefix."""
        if self._base is None:
            return name, None
        tensors = self._base.tensors
        if self._tie is not None and (self._tie[1] == name or self._tie[1].endswith(f".{name}")):
            return self._tie[1], tensors[self._tie[0]].shape
        if name not in tensors:
            near = [known for known in tensors if name.endswith(f".{known}") or known.endswith(f".{name}")]
            if len(near) != 1:
                raise SurgeryError(
                    f"{self.path} was made for another base: {self._base.path} has no tensor '{name}'.",
                    hint=f"The adapter's own record of its base is {self.config.get('base_model_name_or_path')!r}.",
                )
            name = near[0]
        return name, tensors[name].shape

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        """PEFT's rule: the first pattern that matches the end of the module's name, else the general number."""
        found = {"rank": self.config.get("r", 8), "alpha": self.config.get("lora_alpha", 8)}
        try:
            for kind in found:
                for pattern, value in (self.config.get(f"{kind}_pattern") or {}).items():
                    if re.match(rf"(.*\.)?({pattern})$", module):
                        found[kind] = value
                        break
            rank, alpha = int(found["rank"]), float(found["alpha"])
            return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        except (re.error, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise SurgeryError(
                f"{self.path / CONFIG}: rank, alpha or their patterns make no sense ({error})."
            ) from error

    def _is_transposed(self, product: tuple[int, int], shape: tuple[int, ...] | None) -> bool:
        """Whether the base stores (in, out): the shape tells, or where it is square, the config does."""
        if shape is not None and product[0] != product[1]:
            return shape == product[::-1]
        conv1d = self._base is not None and self._base.config.get("model_type") in _CONV1D
        return len(shape or product) == 2 and (conv1d or bool(self.config.get("fan_in_fan_out")))


class AdaptedCheckpoint:
    """`base` with a LoRA switched on, as a `Source`: rows are made when they are read, in float32.

    Touched tensors are declared F32 (F64 on an F64 base) so that nothing is rounded before a merge has used it; the
    others are the base's own, bit for bit. `rounded` declares the base's types instead and rounds once, as a merged
    checkpoint on disk would be. Raises `SurgeryError` for an adapter that does not fit the base.
    """

    def __init__(
        self, base: Source, adapter_folder: str | Path, *, rounded: bool = False, allow_pickle: bool = False
    ) -> None:
        self.base = base
        self.adapter = Adapter(adapter_folder, base, allow_pickle=allow_pickle)
        self.path = Path(f"{base.path}+{self.adapter.path}")
        self.config = copy.deepcopy(base.config)
        self.tensors = dict(base.tensors)
        self._targets = dict(self.adapter.targets)
        self._origin: dict[str, str] = {}  # where rows come from, when not from the tensor of the same name
        self._factors: dict[str, Tensor] = {}
        self._untie()
        for name, target in self._targets.items():
            stored = base.tensors[self._origin.get(name, name)]
            if not stored.is_float:
                raise SurgeryError(f"{self.path}: tensor '{name}' is {stored.dtype}, which nothing can be added to.")
            dtype = stored.dtype if rounded or stored.dtype == "F64" else "F32"
            self.tensors[name] = TensorInfo(name, dtype, target.shape)
            if name.split(".")[-2:-1] == ["embed_tokens"] and target.shape != stored.shape:
                self.config["vocab_size"] = target.shape[0]

    def __repr__(self) -> str:
        return f"AdaptedCheckpoint({str(self.path)!r}, {len(self._targets)} of {len(self.tensors)} tensors touched)"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of dimension 0 of tensor `name`, with the adapter; the same bits in whatever portions."""
        target = self._targets.get(name)
        if target is None:
            return self.base.read(self._origin.get(name, name), start, stop)
        dtype = torch_dtype(self.tensors[name].dtype)
        if target.replaced is not None and not target.shape:
            return target.replaced.to(dtype)
        return _rows(target.shape, start, stop, dtype, lambda i, j: self._block(name, target, i, j))

    def _block(self, name: str, target: Target, start: int, stop: int) -> Tensor:
        import torch

        summed = self._sum(name, target, start, stop)
        if target.magnitude is None:
            return summed
        flat, wide = summed.reshape(len(summed), -1), target.magnitude.to(summed.dtype)
        if not target.transposed:
            factor = wide[start:stop] / torch.linalg.vector_norm(flat, dim=1)
            return (factor[:, None] * flat).view(summed.shape)
        if name not in self._factors:  # two threads may both come here: they find the same numbers
            squares = torch.zeros(flat.shape[1], dtype=torch.float64)
            for i in range(0, target.shape[0], BLOCK_ROWS):
                rows = self._sum(name, target, i, min(i + BLOCK_ROWS, target.shape[0]))
                squares += rows.double().square_().sum(0)
            self._factors[name] = wide / squares.sqrt().to(summed.dtype)
        return self._factors[name] * summed

    def _sum(self, name: str, target: Target, start: int, stop: int) -> Tensor:
        """W + s B A for some rows, in float32 (float64 on an F64 base)."""
        import torch

        origin = self._origin.get(name, name)
        rows = self.base.read(origin, start, stop) if target.replaced is None else target.replaced[start:stop]
        work = torch.float64 if self.base.tensors[origin].dtype == "F64" else torch.float32
        return target.add(rows.to(work), start)

    def _untie(self) -> None:
        """Gives the head a tensor of its own when the adapter touches one side only of a tie."""
        pair = tied_pair(self.base)
        if pair is None or not any(name in self._targets for name in pair):
            return
        embedding, head = pair
        if self.adapter.config.get("ensure_weight_tying") and embedding in self._targets:
            self._targets.pop(head, None)
            self.tensors.pop(head, None)
            return
        self._origin[head] = embedding
        info = self.base.tensors[embedding]
        self.tensors[head] = TensorInfo(head, info.dtype, info.shape, info.file, info.offset)
        for config in (self.config, *(v for v in self.config.values() if isinstance(v, dict))):
            if config is self.config or "tie_word_embeddings" in config:
                config["tie_word_embeddings"] = False


def tied_pair(source: Source) -> tuple[str, str] | None:
    """The names of the embedding and of the head that shares its weights, or None when nothing is shared.

    The config decides; where it is silent, a head without a tensor of its own is tied.
    """
    embeddings = [n for n in source.tensors if n.endswith(".weight") and n.split(".")[-2] in HEADS]
    if len(embeddings) != 1:
        return None
    module = embeddings[0].split(".")[-2]
    heads = [n for n in source.tensors if n.split(".")[-2:] == [HEADS[module], "weight"]]
    configs = [source.config, *(v for v in source.config.values() if isinstance(v, dict))]
    said = next((c["tie_word_embeddings"] for c in configs if "tie_word_embeddings" in c), not heads)
    return (embeddings[0], heads[0] if heads else f"{HEADS[module]}.weight") if said else None


def _rows(shape: tuple[int, ...], start: int, stop: int | None, dtype: torch.dtype, block: Any) -> Tensor:
    """Rows `start:stop` of a tensor of `shape`, put together from `block(i, j)` over blocks that never shift."""
    import torch

    start, stop, _ = slice(start, stop).indices(shape[0])
    out = torch.empty(max(0, stop - start), *shape[1:], dtype=dtype)
    for i in range(start - start % BLOCK_ROWS, stop, BLOCK_ROWS):
        low, high = max(i, start), min(i + BLOCK_ROWS, stop)
        out[low - start : high - start] = block(i, min(i + BLOCK_ROWS, shape[0]))[low - i : high - i]
    return out


def _read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, if it describes a change of weights that is understood."""
    if not (folder / CONFIG).is_file():
        raise SurgeryError(f"{folder} is not an adapter: it has no {CONFIG}.", hint="Give a folder that PEFT saved.")
    config = read_json(folder / CONFIG)
    merge = "Merge it with PEFT (`merge_and_unload`), save the model and give that folder."
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise SurgeryError(f"{folder} is a {kind} adapter; LoRA and DoRA can be read here.", hint=merge)
    for option in _UNSUPPORTED:
        if config.get(option):
            raise SurgeryError(f"{folder} uses PEFT's option {option}, which is not supported here.", hint=merge)
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise SurgeryError(
            f"{folder} belongs to a base that its initialisation ({start}) has changed.",
            hint="Save it with PEFT's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it.",
        )
    return config


def _read_parts(folder: Path, allow_pickle: bool) -> dict[str, dict[str, Tensor]]:
    """What is stored for each module: A.weight, B.weight, B.bias, magnitude.weight, base.weight, base.bias.

    `base.*` replaces the module's own tensor; the key embedding.weight marks the matrices of an embedding.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        file = folder / "adapter_model.bin"
    if not file.is_file():
        raise SurgeryError(f"{folder} holds no adapter_model.safetensors.", hint="Fetch the folder again.")
    source = open_checkpoint(file, allow_pickle=allow_pickle)
    modules: dict[str, dict[str, Tensor]] = {}
    for key in source.tensors:
        name = key.removeprefix("base_model.model.")
        match = _PART.fullmatch(name)
        if match is None and (_FOREIGN.search(name) or "." not in name):
            raise SurgeryError(f"{file}: tensor '{key}' is of a kind that is not supported.")
        if match is None:
            module, _, leaf = name.rpartition(".")
            part = f"base.{leaf}"
        else:
            module, stored, leaf = match["module"], match["part"], match["leaf"] or "weight"
            short = stored.removeprefix("lora_").removeprefix("embedding_")
            short = {"base_layer": "base", "modules_to_save": "base", "magnitude_vector": "magnitude"}.get(short, short)
            part = f"{short}.{leaf}"
            if stored.startswith("lora_embedding"):
                modules.setdefault(module, {})["embedding.weight"] = source.read(key)
        modules.setdefault(module, {})[part] = source.read(key)
    return modules
