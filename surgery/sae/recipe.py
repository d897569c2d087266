"""The recipe of dictionaries: what a YAML file, the command line and `train(...)` all say in the same words.

    model: tiny-chain                     # or [base, tuned]: crosscoders of both
    data: {task: chain}
    dictionaries:
      small: {site: resid_post.2, latents: 512, rule: {batchtopk: {k: 16}}}
      large: {site: resid_post.2, latents: 2048, rule: {batchtopk: {k: 16}}}
    steps: 1000
    rows: 1024

Everything that can be known is checked before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from surgery.anatomy import Site
from surgery.anatomy.sites import UNLAYERED
from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.sae.rules import RULES, Rule
from surgery.sae.text import Reading
from surgery.sae.train import Settings
from surgery.training import recipe as recipes
from surgery.training.recipe import CheckpointSettings, Part

PACKAGED = Path(__file__).parent / "recipes"
NAME = re.compile(r"[\w][\w.-]*")


class Optimizer(Part):
    """Adam and its learning rate."""

    lr: float = Field(3e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient (0: never clipped)")
    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(0.0, ge=0, description="share of the run, or steps when 1 or more")
    final: float = Field(0.0, ge=0, le=1, description="share of the peak at the end")


class OneDictionary(Part):
    """Of several over one stream of activations."""

    site: str = Field(description="where it reads, as `resid_post.6`")
    target: str | None = Field(None, description="where it writes, for a transcoder; else it rebuilds what it reads")
    latents: int = Field(ge=1)
    rule: Any = Field("batchtopk", description="what makes it sparse: a name, or {name: {setting: value}}")
    skip: bool = Field(False, description="a transcoder with a linear map beside it")
    optimizer: Optimizer | None = Field(None, description="its own; else the recipe's")
    normalise: bool = Field(True, description="activations are brought to a mean length of sqrt(width) in training")
    dead_after: int | None = Field(None, ge=1, description="rows without use after which a latent is dead; by default "
                                   "a tenth of the run, at most 10 million")  # fmt: skip


class Evaluation(Part):
    """On sequences that are never trained on (of tasks: rows of another seed)."""

    sequences: int = Field(64, ge=0, description="so many (0: none)")
    loss: bool = Field(True, description="what the model loses when reconstructions stand in")


class Recipe(Part):
    """One run."""

    name: str = "dictionaries"
    about: str = ""
    model: Any = Field(None, description="folder, name in the zoo or hub name; several of them: a crosscoder")
    difference: bool = Field(False, description="of two models: a dictionary of what the second adds to the first")
    data: Any = Field(None, description="texts: see surgery.sae.text")
    reading: Reading = Reading()  # type: ignore[call-arg]
    cache: Path | None = Field(None, description="folder of activations on disk: written if it is not there, then read")
    cache_rows: int = Field(1 << 20, ge=1, description="rows that a cache is filled with")
    dictionaries: dict[str, OneDictionary] = Field(default_factory=dict)
    steps: int = Field(1000, ge=1, description="steps of the optimizer")
    rows: int = Field(4096, ge=1, description="activations in one step")
    buffer: int = Field(65_536, ge=1, description="activations that a step's are drawn from")
    optimizer: Optimizer = Optimizer()  # type: ignore[call-arg]
    evaluate: Evaluation = Evaluation()  # type: ignore[call-arg]
    checkpoint: CheckpointSettings = CheckpointSettings(every=1000)  # type: ignore[call-arg]
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the models; dictionaries are float32")
    seed: int = 0
    output: Path | None = None
    folder: Path = Field(Path("."), exclude=True, description="where files that the recipe names are looked up")

    @property
    def models(self) -> list[Any]:
        """The models, one or more."""
        return list(self.model) if isinstance(self.model, list | tuple) else [self.model]

    @property
    def sites(self) -> list[str]:
        """Every site that is read."""
        each = (s for one in self.dictionaries.values() for s in (one.site, one.target) if s is not None)
        return list(dict.fromkeys(str(Site.parse(s)) for s in each))


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or by the name of a packaged one, with `key.path=value` changes.

    Raises `SurgeryError` for files, keys and values that are wrong; the sentence names the nearest right key.
    """
    words, folder = recipes.read(path, changes, PACKAGED)
    return make(words, folder)


def make(words: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
    """A recipe from its words. Raises `SurgeryError` in a sentence for each kind of mistake."""
    recipe = recipes.checked(Recipe, {**words, "folder": Path(folder)})
    check(recipe)
    return recipe


def packaged() -> dict[str, Recipe]:
    """Every recipe that comes with the package, by name."""
    return {file.stem: load(file) for file in sorted(PACKAGED.glob("*.yaml"))}


def check(recipe: Recipe) -> None:
    """Raises `SurgeryError` for what could not work whatever the model is."""
    if not recipe.dictionaries:
        raise SurgeryError("The recipe trains no dictionary.",
                           hint="dictionaries: {one: {site: resid_post.2, latents: 1024}}")  # fmt: skip
    if recipe.data is None:
        raise SurgeryError("The recipe has no data.", hint="data: {file: texts.jsonl}, or data: {task: chain}")
    if recipe.cache is None and recipe.buffer < recipe.rows:
        raise SurgeryError(f"`buffer` holds {recipe.buffer:,} activations, and a step takes {recipe.rows:,}.",
                           hint="Raise buffer, well above rows.")  # fmt: skip
    if recipe.difference and len(recipe.models) != 2:
        raise SurgeryError("`difference` is of two models.", hint="model: [base, tuned]")
    for name, one in recipe.dictionaries.items():
        if name in ("ahead", "buffer"):
            raise SurgeryError(f"'{name}' is what checkpoints call something else.", hint="Give it another name.")
        if not NAME.fullmatch(name):
            raise SurgeryError(f"'{name}' is no name for a dictionary: a folder is called by it.",
                               hint="Letters, digits, '_', '-' and '.'.")  # fmt: skip
        for site in filter(None, (one.site, one.target)):
            _one_place(name, Site.parse(site))
        if one.skip and one.target is None:
            raise SurgeryError(f"'{name}': only a transcoder has a skip.", hint="Give it a target.")
        rule_of(one.rule).check(one.latents)


def _one_place(name: str, site: Site) -> None:
    if site.layer is None and site.name not in UNLAYERED:
        raise SurgeryError(f"'{name}' reads '{site}' of all layers at once, and a dictionary has one place.",
                           hint=f"Write '{site.name}.2'.")  # fmt: skip
    if site.position is not None or site.name in ("scores", "pattern"):
        raise SurgeryError(f"'{name}' reads '{site}': a dictionary reads one row a token, whatever its position.",
                           hint="`reading.positions` says which tokens count.")  # fmt: skip


def rule_of(written: Any) -> Rule:
    """What makes a dictionary sparse, as `name`, `{name: {setting: value}}`, or the object itself.

    Raises `SurgeryError` for names, settings and values that are wrong.
    """
    if isinstance(written, Rule):
        return written
    if isinstance(written, str):
        written = {written: {}}
    if not isinstance(written, Mapping) or len(written) != 1:
        raise SurgeryError(f"One rule is expected, found {str(written)[:60]!r}.", hint="rule: {batchtopk: {k: 32}}")
    ((name, settings),) = written.items()
    kind = RULES.lookup(name)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for key in settings or {}:
        if key not in known:
            raise SurgeryError(f"The rule '{name}' has no setting '{key}'.", hint=nearest(key, known))
    try:
        found: Rule = TypeAdapter(kind).validate_python(dict(settings or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SurgeryError(f"The rule '{name}', {where}: {first['msg'][0].lower()}{first['msg'][1:]}, "
                           f"found {first['input']!r}.") from None  # fmt: skip
    return found


def settings_of(recipe: Recipe, one: OneDictionary) -> Settings:
    """How one of the dictionaries learns."""
    o = one.optimizer or recipe.optimizer
    dead_after = one.dead_after or min(10_000_000, max(1, recipe.steps * recipe.rows // 10))
    return Settings(o.lr, o.betas, o.clip, o.warmup, o.shape, o.final, dead_after, one.normalise)
