"""Where things are in one model, checked against what the model really does rather than believed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from surgery.anatomy import points
from surgery.anatomy.families import FAMILIES, Family, family_of
from surgery.anatomy.sites import SITES, UNLAYERED, Site
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_KNOWN: WeakKeyDictionary[Any, Anatomy] = WeakKeyDictionary()


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a causal language model, made and checked once for each model object.

    Raises `SurgeryError` when its parts can't be found, or are not what the definitions of the sites say.
    """
    found = _KNOWN.get(model)
    try:
        if found is None or not found.describes(model):
            found = _KNOWN[model] = _checked(model)
    except SurgeryError:
        raise
    except Exception as error:  # whatever the code of an unknown family trips over
        told = str(error).strip().partition("\n")[0]
        raise SurgeryError(f"{type(model).__name__} can't be looked into: {told}") from error
    return found


def _blocks(model: PreTrainedModel, family: Family) -> list[Any]:
    stack: Any = model.get_submodule(family.stack)
    return list(stack)


def _checked(model: PreTrainedModel) -> Anatomy:
    """The checked anatomy; how a fused projection of an unlisted family falls apart is found by trying."""
    family = family_of(model)
    if family.qkv is not None and model.config.model_type not in FAMILIES:
        with suppress(SurgeryError):
            found = Anatomy(model, replace(family, layout="grouped"))
            found.check()
            return found
    found = Anatomy(model, family)
    found.check()
    return found


class Anatomy:
    """Modules by what they do, sizes, and which sites there are. It keeps no reference to the model itself."""

    def __init__(self, model: PreTrainedModel, family: Family | None = None) -> None:
        self.family: Family = family or family_of(model)
        self.name: str = model.config.model_type
        try:
            self.blocks = _blocks(model, self.family)
            self.final_norm = model.get_submodule(self.family.final_norm)
            self.embed: Any = model.get_input_embeddings()
            self.head: Any = model.get_output_embeddings()
            config: Any = model.config.get_text_config()
            if self.head is None:
                raise SurgeryError(f"{type(model).__name__} has no language model head.",
                                   hint="Load it with AutoModelForCausalLM.")  # fmt: skip
            self.n_layers = len(self.blocks)
            self.n_heads: int = config.num_attention_heads
            self.d_model: int = config.hidden_size
            self.d_head = width(self.out(0)) // self.n_heads
            self.n_kv_heads = self._kv_heads()
        except AttributeError as error:
            raise SurgeryError(
                f"{type(model).__name__} is not built as models of type '{self.name}' are: {error}."
            ) from error
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale: float = (getattr(config, "logit_scale", None) or 1.0) / getattr(config, "logits_scaling", 1.0)
        self.heads_apart = True
        """Whether each head's z comes of its own query, key and value alone; found by the check."""
        self._self_check = _SelfCheck(model)

    def __repr__(self) -> str:
        kind = "parallel blocks" if self.parallel else "blocks"
        return (f"Anatomy({self.name}: {self.n_layers} {kind} of {self.n_heads} heads ({self.n_kv_heads} of keys and "
                f"values) of {self.d_head}, stream of {self.d_model})")  # fmt: skip

    def _kv_heads(self) -> int:
        if self.family.k is not None:
            return width(self.blocks[0].get_submodule(self.family.k), output=True) // self.d_head
        slots = width(self.blocks[0].get_submodule(self.family.qkv), output=True) // self.d_head
        return (slots - self.n_heads) // 2

    def describes(self, model: PreTrainedModel) -> bool:
        """Whether these are still the model's modules: it may have lost layers, or got another head."""
        mine = (*self.blocks, self.final_norm, self.embed, self.head)
        ends = (model.get_submodule(self.family.final_norm), model.get_input_embeddings())
        there = (*_blocks(model, self.family), *ends, model.get_output_embeddings())
        return len(mine) == len(there) and all(a is b for a, b in zip(mine, there, strict=True))

    # ---- modules

    def attention(self, layer: int) -> nn.Module:
        """The attention module."""
        return self.blocks[layer].get_submodule(self.family.attention)

    def out(self, layer: int) -> nn.Module:
        """The output projection of attention."""
        return self.blocks[layer].get_submodule(self.family.out)

    def mlp(self, layer: int) -> nn.Module | None:
        """The MLP (or mixture of experts); None where its projections are children of the block."""
        return None if self.family.mlp is None else self.blocks[layer].get_submodule(self.family.mlp)

    def down(self, layer: int) -> nn.Module:
        """The MLP's second projection."""
        return self.blocks[layer].get_submodule(self._path("down", "mlp_post", layer))

    def pre(self, layer: int) -> nn.Module:
        """The projection whose output meets the activation: the gate where there is one."""
        family = self.family
        return self.blocks[layer].get_submodule(
            self._path("gate_up" if family.gate_up else "gate" if family.gate else "up", "mlp_pre", layer)
        )

    def norm(self, role: str, layer: int) -> nn.Module | None:
        """One of the block's norms: input_norm, attention_norm, mlp_norm, mlp_out_norm; None where there is none."""
        path = getattr(self.family, role)
        return None if path is None else self.blocks[layer].get_submodule(path)

    def attn_writer(self, layer: int) -> nn.Module:
        """The module whose output attention adds to the stream: its output projection, or the norm behind it."""
        return self.norm("attention_norm", layer) or self.out(layer)

    def mlp_writer(self, layer: int) -> nn.Module:
        """The module whose output the MLP adds to the stream."""
        return self.norm("mlp_out_norm", layer) or (self.mlp(layer) if self.family.down is None else self.down(layer))  # type: ignore[return-value]

    def mlp_reader(self, layer: int) -> nn.Module:
        """The module that reads the normed stream for the MLP."""
        return self.mlp(layer) or self.blocks[layer].get_submodule(self.family.up)

    def _path(self, role: str, site: str, layer: int) -> str:
        path = getattr(self.family, role)
        if path is None:
            raise SurgeryError(f"There is no site '{site}' in {self.name}: {self.missing(site)}.")
        return path

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same stream."""
        return self.family.parallel

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_heads // self.n_kv_heads

    def norms_over_heads(self, layer: int) -> bool:
        """Whether queries and keys pass a norm over all heads at once (OLMo-2), so that heads depend on each other."""
        children = dict(self.attention(layer).named_children())
        return any(
            (weight := getattr(child, "weight", None)) is not None
            and weight.dim() == 1
            and weight.numel() > self.d_head
            for name, child in children.items()
            if "norm" in name
        )

    def d_mlp(self, layer: int = 0) -> int:
        """Neurons of a layer's MLP."""
        return width(self.down(layer))

    def logits(self, final: Tensor) -> Tensor:
        """Logits (..., vocab) of the last norm's output (..., d_model), soft-capped where the model does so."""
        return self.capped(self.head(final))

    def capped(self, logits: Tensor) -> Tensor:
        """What the model does to the head's output."""
        logits = logits * self.logit_scale if self.logit_scale != 1.0 else logits
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    # ---- sites

    def missing(self, name: str) -> str | None:
        """Why a site does not exist in this model; None when it does."""
        if name == "resid_mid" and self.parallel:
            return "its blocks are parallel, attention and MLP read the same stream"
        if name in ("mlp_pre", "mlp_post") and self.family.down is None:
            return "its MLPs are mixtures of experts: which neurons run depends on the token"
        return None

    def heads_of(self, name: str) -> int | None:
        """How many heads a site has; of mlp_pre and mlp_post: neurons. None for sites of the stream."""
        kind = SITES[name]
        if kind == "neurons":
            return self.d_mlp()
        return None if kind == "stream" else self.n_kv_heads if name in ("k", "v") else self.n_heads

    def width_of(self, site: str | Site) -> int:
        """Numbers of one token's row at a site of one layer, heads side by side."""
        place = Site.parse(site)
        if place.kind == "neurons":
            return self.d_mlp(place.layer or 0)
        heads = self.heads_of(place.name)
        return self.d_model if heads is None else self.d_head * (1 if place.head is not None else heads)

    def expand(self, patterns: Iterable[str | Site]) -> list[Site]:
        """The sites of names, one a layer where no layer is named, each once.

        Raises `SurgeryError` for a site that the architecture has not, and for a layer or head out of range.
        """
        if isinstance(patterns, (str, Site)):
            patterns = [patterns]
        found: dict[Site, None] = {}
        for pattern in patterns:
            site = Site.parse(pattern)
            if why := self.missing(site.name):
                raise SurgeryError(f"There is no site '{site.name}' in {self.name}: {why}.")
            if site.layer is not None and not 0 <= site.layer < self.n_layers:
                raise SurgeryError(f"'{site}': there is no layer {site.layer}; layers are 0 to {self.n_layers - 1}.")
            count = self.heads_of(site.name)
            if site.head is not None and count is not None and not 0 <= site.head < count:
                what = "neuron" if site.kind == "neurons" else "key-value head" if site.name in ("k", "v") else "head"
                raise SurgeryError(f"'{site}': there is no {what} {site.head}; {what}s are 0 to {count - 1}.")
            if site.layer is None and site.name not in UNLAYERED:
                found |= {site.at(layer): None for layer in range(self.n_layers)}
            else:
                found[site] = None
        return list(found)

    # ---- the check

    def check(self) -> None:
        """Runs five tokens twice: sites must be what they are said to be, and edits by identity must change nothing.

        Raises `SurgeryError` naming the first definition that does not hold.
        """
        self._self_check(self)


class _SelfCheck:
    """The definitions of the sites, put to the model; it is held weakly."""

    def __init__(self, model: PreTrainedModel) -> None:
        from weakref import ref

        self.model = ref(model)

    def __call__(self, anatomy: Anatomy) -> None:
        import torch

        model: Any = self.model()
        names = [n for n in SITES if n not in ("scores", "pattern") and not anatomy.missing(n)]
        sites = anatomy.expand(names)
        ids = torch.arange(3, 8, device=anatomy.embed.weight.device)[None] % model.config.get_text_config().vocab_size
        seen: dict[Site, Tensor] = {}
        with _evaluating(model), torch.no_grad():
            with _attached(anatomy, sites, lambda site: lambda value: seen.__setitem__(site, value.clone())):
                output = model(ids, use_cache=True)
                logits = output.logits
            with _attached(anatomy, sites, lambda site: lambda value: value.clone()):
                again = model(ids).logits
            self._same(anatomy, "logits = head(final)", logits, anatomy.logits(seen[Site("final")]))
        kept = next((v for v in output.values() if hasattr(v, "layers")), None)
        self._same(anatomy, "logits after an edit that changes nothing", logits, again)
        for layer in range(anatomy.n_layers):
            at = {name: seen[Site(name, layer)] for name in names if name not in UNLAYERED}
            written = at["resid_pre"] + at["attn_out"]
            if not anatomy.parallel:
                self._same(anatomy, f"resid_mid.{layer} = resid_pre + attn_out", at["resid_mid"], written)
            self._same(anatomy, f"resid_post.{layer} = resid_pre + attn_out + mlp_out", at["resid_post"],
                       written + at["mlp_out"])  # fmt: skip
            if layer + 1 < anatomy.n_layers:
                after = seen[Site("resid_pre", layer + 1)]
                self._same(anatomy, f"resid_post.{layer} = resid_pre.{layer + 1}", at["resid_post"], after)
            for name, count in (("q", anatomy.n_heads), ("k", anatomy.n_kv_heads), ("v", anatomy.n_kv_heads)):
                if at[name].shape != (1, 5, count, anatomy.d_head):
                    raise self._failed(anatomy, f"{name}.{layer} has {count} heads of {anatomy.d_head}")
            if kept is not None:
                last = kept.layers[layer].values[0, :, -1]  # some caches hold a value for every query head
                self._same(anatomy, f"v.{layer} is what the cache keeps", last,
                           at["v"][0, -1].repeat_interleave(len(last) // anatomy.n_kv_heads, 0))  # fmt: skip
        if anatomy.name not in FAMILIES and anatomy.n_kv_heads > 1:
            anatomy.heads_apart = self._apart(anatomy, model, ids, seen)

    @staticmethod
    def _apart(anatomy: Anatomy, model: Any, ids: Tensor, seen: dict[Site, Tensor]) -> bool:
        """Whether the values of the first heads reach only their own z: no norm over heads, no heads in pairs."""
        import torch

        v, z = Site("v", anatomy.n_layers - 1), Site("z", anatomy.n_layers - 1)
        found: list[Tensor] = []

        def change(value: Tensor) -> Tensor:
            return torch.cat([value[:, :, :1] + 1, value[:, :, 1:]], 2)

        def visit(site: Site) -> Any:
            return change if site == v else found.append

        with _evaluating(model), torch.no_grad(), _attached(anatomy, [v, z], visit):
            model(ids)
        before, after = (value[:, :, anatomy.group :].float() for value in (seen[z], found[0]))
        return bool((before - after).abs().max() <= 1e-3 * before.abs().max())

    def _same(self, anatomy: Anatomy, what: str, one: Tensor, other: Tensor) -> None:
        import torch

        one, other = one.float(), other.float()
        if bool(one.isnan().any() | other.isnan().any()):
            raise SurgeryError(f"This {anatomy.name} computes NaN: its weights hold numbers that are not finite.",
                               hint="Take the checkpoint from before it broke, or fetch it again.")  # fmt: skip
        scale = one.abs().max().clamp(min=1e-6)
        precise = torch.finfo(anatomy.embed.weight.dtype).eps if anatomy.embed.weight.is_floating_point() else 1e-2
        if one.shape != other.shape or not ((one - other).abs().max() <= 64 * precise * scale):
            raise self._failed(anatomy, what)

    @staticmethod
    def _failed(anatomy: Anatomy, what: str) -> SurgeryError:
        return SurgeryError(
            f"The parts of this {anatomy.name} are not where they were looked for: '{what}' does not hold.",
            hint="Its code differs from the family's; a row in surgery/anatomy/families.py can describe it.",
        )


@contextmanager
def _attached(anatomy: Anatomy, sites: list[Site], visit: Any) -> Iterator[None]:
    handles: list[points.Handle] = []
    try:
        for site in sites:
            handles += points.attach(anatomy, site, visit(site))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def width(module: nn.Module, *, output: bool = False) -> int:
    """Numbers that a projection reads, or gives; quantised, adapted and GPT-2's transposed ones included."""
    attribute = getattr(module, "out_features" if output else "in_features", None)
    if isinstance(attribute, int):
        return attribute
    weight: Any = module.weight  # Conv1D: (in, out)
    return int(weight.shape[1 if output else 0])
