"""The recipe of SAE-tuning and its controls: what a YAML file, the command line and `run(...)` say in the same words.

    target: tiny-sums-sft
    source: tiny-sums-grpo
    data: {task: direct}                       # questions with their answers, not worked out
    site: [resid_post.1, resid_post.2]         # of several the best on validation rows, for each arm
    dictionary: {latents: 512, rule: {topk: {k: 16}}, steps: 300}
    tuning: {lr: [1.0e-4, 1.0e-3], steps: 60, rows: 32}
    arms: [source, own, shuffled, random, noise, sft, distillation, unchanged]
    seeds: [0, 1, 2]
    sweep: {seeds: [100], n: 100}
    evaluate: {data: {task: chain}, n: 200}

Resa (arXiv:2506.09967) has texts laid end to end in sequences of 2,048 tokens (`reading: {packing: true, context:
2048}`), one in a batch, a learning rate of 1e-6, and texts whose thinking is the answer alone (`answer_only`).
Labels are learned at `reading.positions`, a teacher is followed at all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from surgery.errors import SurgeryError
from surgery.sae.recipe import rule_of
from surgery.sae.stand_in import GRADIENTS
from surgery.sae.text import Reading
from surgery.sae.tune import Adapter
from surgery.sae.tune_arms import ARMS
from surgery.training import recipe as recipes
from surgery.training.recipe import Part

PACKAGED = Path(__file__).parent / "recipes" / "tuning"
THINKING = (
    "A user asks and an assistant answers. The assistant thinks first, between <think> and </think>, and then gives "
    "its answer between <answer> and </answer>.\n"
)


class Stage(Part):
    """Stage one: a dictionary of each model that an arm asks for."""

    latents: int = Field(1024, ge=1)
    rule: Any = Field(default_factory=lambda: {"topk": {"k": 32}}, description="as of any dictionary")
    start: Path | None = Field(None, description="folder of a dictionary that all begin as")
    steps: int = Field(1000, ge=0, description="of the optimizer (0, with a start: as it is)")
    positions: Literal["all", "completion", "last"] = Field("all", description="tokens that it reads")
    rows: int = Field(1024, ge=1, description="activations in one step")
    buffer: int = Field(16_384, ge=1, description="activations that a step's are drawn from")
    lr: float = Field(1e-3, ge=0)
    warmup: float = Field(0.0, ge=0, description="share of the run, or steps when 1 or more")
    shape: str = Field("constant", pattern="constant|linear|cosine")


class Tuning(Part):
    """Stage two: the LoRA."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(128.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    modules: list[str] | None = None
    lr: list[float] | float = Field(1e-6, description="of several the best on validation rows, for each arm")
    steps: int = Field(1000, ge=1)
    rows: int = Field(1, ge=1, description="sequences in one step")
    clip: float = Field(1.0, ge=0)
    gradient: str = Field("none", description="through what stands in: none, straight or through")
    gradient_checkpointing: bool = False

    @property
    def adapter(self) -> Adapter:
        """The LoRA."""
        modules = None if self.modules is None else tuple(self.modules)
        return Adapter(self.rank, self.alpha, self.dropout, modules)

    @property
    def rates(self) -> list[float]:
        """The learning rates that are tried."""
        return self.lr if isinstance(self.lr, list) else [self.lr]


class Sweep(Part):
    """How each arm's site and learning rate are chosen, where there are several."""

    seeds: list[int] = Field(default_factory=lambda: [100], description="none of the seeds that are reported")
    n: int = Field(100, ge=1, description="validation rows; none of the test's")


class Evaluation(Part):
    """Greedy accuracy on rows that are in no text."""

    data: Any = Field(None, description="rows with prompts and answers; by default those of `data`")
    n: int = Field(200, ge=1, description="test rows")
    seed: int = Field(990, description="of generated rows")
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(256, ge=1)
    chat: bool = False


class Recipe(Part):
    """One comparison."""

    name: str = "sae-tuning"
    about: str = ""
    target: Any = Field(None, description="what is tuned: folder, name in the zoo or hub name")
    source: Any = Field(None, description="what is better at something, of the same width and tokens")
    data: Any = Field(None, description="texts to tune on: see surgery.sae.text")
    trigger: Any = Field(None, description="texts of stage one; by default the same data")
    reading: Reading = Field(default_factory=lambda: Reading(packing=False, batch=32))  # type: ignore[call-arg]
    site: list[str] | str = "resid_post.1"
    dictionary: Stage = Stage()  # type: ignore[call-arg]
    tuning: Tuning = Tuning()  # type: ignore[call-arg]
    arms: list[str] = Field(default_factory=lambda: list(ARMS))
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2, 3, 4], min_length=1)
    sweep: Sweep = Sweep()  # type: ignore[call-arg]
    evaluate: Evaluation = Evaluation()  # type: ignore[call-arg]
    output: Path | None = None
    folder: Path = Field(Path("."), exclude=True, description="where files that the recipe names are looked up")

    @property
    def sites(self) -> list[str]:
        """The sites that are tried."""
        return self.site if isinstance(self.site, list) else [self.site]

    def choices(self, arm: str) -> list[tuple[str, float]]:
        """What is tried of an arm: (site, learning rate). Without a site the first; untrained, a rate of 0."""
        known = ARMS.lookup(arm)
        sites = self.sites if known.site else self.sites[:1]
        rates = self.tuning.rates if known.trained else [0.0]
        return [(site, rate) for site in sites for rate in rates]


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


def check(recipe: Recipe) -> None:
    """Raises `SurgeryError` for what could not work whatever the models are."""
    for key, hint in {"target": "tiny-sums-sft", "source": "tiny-sums-grpo", "data": "{task: direct}"}.items():
        if getattr(recipe, key) is None:
            raise SurgeryError(f"The recipe has no {key}.", hint=f"{key}: {hint}")
    several: dict[str, list[Any]] = {
        "arm": recipe.arms, "site": recipe.sites, "learning rate": recipe.tuning.rates
    }  # fmt: skip
    for what, words in several.items():
        if not words or len(set(words)) < len(words):
            raise SurgeryError(f"{what.capitalize()}s are different ones, at least one: found {words}.")
    for name in recipe.arms:
        ARMS.lookup(name)
    GRADIENTS.lookup(recipe.tuning.gradient)
    rule_of(recipe.dictionary.rule).check(recipe.dictionary.latents)
    if not recipe.dictionary.steps and recipe.dictionary.start is None:
        raise SurgeryError("Dictionaries that are not trained need a start.", hint="dictionary: {start: FOLDER}")
    rows, buffer = recipe.dictionary.rows, recipe.dictionary.buffer
    if buffer < rows:
        raise SurgeryError(f"`dictionary.buffer` holds {buffer:,} activations, and a step takes {rows:,}.",
                           hint="Raise it, well above rows.")  # fmt: skip
    if shared := set(recipe.seeds) & set(recipe.sweep.seeds):
        raise SurgeryError(f"Seed {min(shared)} is chosen by and reported: what is chosen by it looks too good.",
                           hint="Give sweep.seeds that are not among seeds.")  # fmt: skip
    if any(len(recipe.choices(arm)) > 1 for arm in recipe.arms) and not recipe.sweep.seeds:
        raise SurgeryError("Several sites or learning rates are tried, and there are no seeds to choose them by.",
                           hint="sweep: {seeds: [100]}")  # fmt: skip


def answer_only(problem: str, answer: str, system: str = THINKING) -> dict[str, str]:
    """A row in Resa's format: the thinking is the answer alone. For models that were trained on such marks."""
    return {
        "prompt": f"{system}User:\n {problem}\n\nAssistant:\n",
        "completion": f" <think> {answer} </think>\n<answer> Answer: {answer}</answer>",
        "answer": answer,
    }
