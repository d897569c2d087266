"""The recipe of a training run: what a YAML file, the command line and `train(...)` all say in the same words.

    model: tiny-base
    data: {task: chain, terms: [4, 6]}
    objective: grpo
    reward: accuracy
    rollouts: {prompts: 32, group: 8, max_new_tokens: 40}
    optimizer: {lr: 1.0e-4}
    steps: 40

Everything is checked before a model is loaded: names, parameters, impossible combinations, columns of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgery.errors import SurgeryError
from surgery.registry import nearest

PACKAGED = Path(__file__).parent / "recipes"


class Part(BaseModel):
    """Of a recipe: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


Kind = TypeVar("Kind", bound=BaseModel)


class BatchSettings(Part):
    """Of updates."""

    rows: int = Field(8, ge=1, description="rows of a data set in one update, over all processes")
    micro_batch: int = Field(0, ge=0, description="rows in one pass of the model (0: all of the update's)")
    epochs: int = Field(1, ge=1, description="passes over each batch of rollouts")
    minibatches: int = Field(1, ge=1, description="updates in one pass over a batch of rollouts")
    max_length: int = Field(0, ge=0, description="tokens kept of prompt and completion, from the start (0: all)")
    packing: int = Field(0, ge=0, description="rows laid end to end in sequences of so many tokens (0: padded)")
    share_prompts: bool = Field(True, description="a group's prompt goes through the model once")


class RolloutSettings(Part):
    """Of sampling."""

    prompts: int = Field(8, ge=1, description="prompts in one iteration, over all processes")
    group: int = Field(8, ge=1, description="completions of each prompt")
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: tuple[str, ...] = ()
    batch_size: int = Field(256, ge=1, description="rows decoded at a time")


class OptimizerSettings(Part):
    """AdamW and its learning rate."""

    lr: float = Field(1e-5, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient (0: never clipped)")
    shape: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.0, ge=0, description="share of the run, or steps when 1 or more")
    final: float = Field(0.0, ge=0, le=1, description="share of the peak at the end")


class EvaluateSettings(Part):
    """Greedy accuracy on rows that training never sees."""

    every: int = Field(0, ge=0, description="steps between two evaluations (0: none)")
    data: Any = Field(None, description="as `data`; by default the training task with another seed")
    n: int = Field(100, ge=1)
    max_new_tokens: int = Field(0, ge=0, description="0: as in rollouts")
    batch_size: int = Field(128, ge=1)


class CheckpointSettings(Part):
    """What `--resume` starts from."""

    every: int = Field(0, ge=0, description="steps between two checkpoints (0: none but the result)")
    keep: int = Field(2, ge=1)


class Recipe(Part):
    """One training run."""

    name: str = "run"
    about: str = ""
    paper: str = ""
    model: Any = Field(None, description="folder, name in the zoo or hub name")
    data: Any = Field(None, description="rows to train on: see surgery.training.data")
    demonstrations: Any = Field(None, description="rows of a second data set, for objectives on demonstrations")
    objective: Any = "sft"
    source: Any = Field(None, description="where batches come from; by default what the objective reads")
    curriculum: Any = "shuffled"
    reward: Any = None
    steps: int = Field(100, ge=1, description="optimizer steps")
    batch: BatchSettings = BatchSettings()  # type: ignore[call-arg]
    rollouts: RolloutSettings = RolloutSettings()  # type: ignore[call-arg]
    optimizer: OptimizerSettings = OptimizerSettings()  # type: ignore[call-arg]
    evaluate: EvaluateSettings = EvaluateSettings()  # type: ignore[call-arg]
    checkpoint: CheckpointSettings = CheckpointSettings()  # type: ignore[call-arg]
    backbone: Any = Field(None, description="frozen models whose logits are added to the trained one's (UniR)")
    tuning: Any = Field(None, description="which numbers move, by a selection, or LoRA: see surgery.tuning.plan")
    trainable: list[str] | None = Field(None, description="patterns of the parameters that move (default: all)")
    frozen: list[str] = Field(default_factory=list, description="patterns of parameters that stay")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the arithmetic; weights are float32")
    gradient_checkpointing: bool = False
    dropout: bool = Field(False, description="the model's own dropout rates; never for old and new log-probs at once")
    parallel: Literal["none", "ddp", "fsdp2"] = "none"
    trackers: list[str] = Field(default_factory=list, description="tensorboard, wandb, ... by accelerate")
    chat: bool = Field(False, description="put plain prompts into the chat template")
    nonfinite: Literal["raise", "skip"] = "raise"
    seed: int = 0
    output: Path | None = None
    folder: Path = Field(Path("."), exclude=True, description="where files that the recipe names are looked up")

    def moves(self, name: str, before: bool = True) -> bool:
        """Whether the parameter `name` is trained; without `trainable`, those are that moved `before`."""
        wanted = before if self.trainable is None else any(fnmatch(name, pattern) for pattern in self.trainable)
        return wanted and not any(fnmatch(name, pattern) for pattern in self.frozen)


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or by the name of a packaged one, with `key.path=value` changes.

    Raises `SurgeryError` for files, keys and values that are wrong; the sentence names the nearest right key.
    """
    words, folder = read(path, changes, PACKAGED)
    return make(words, folder)


def make(words: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
    """A recipe from its words. Raises `SurgeryError` in a sentence for each kind of mistake."""
    return checked(Recipe, {**words, "folder": Path(folder)})


def read(path: str | Path, changes: Sequence[str], packaged: Path) -> tuple[dict[str, Any], Path]:
    """The words of a YAML file, or of one in the folder `packaged` by name, and the folder that it lies in.

    Raises `SurgeryError` for what is not there, or no keys and values.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        file = packaged / f"{path}.yaml"
    if not file.is_file():
        names = [p.stem for p in packaged.glob("*.yaml")]
        raise SurgeryError(f"There is no recipe {path}, neither as a file nor by name.", hint=nearest(str(path), names))
    try:
        words = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SurgeryError(f"{file} is not YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(words, dict):
        raise SurgeryError(f"{file} holds no recipe: expected keys and values.")
    for change in changes:
        key, sign, text = change.partition("=")
        if not sign:
            raise SurgeryError(f"--set {change}: expected key=value.", hint="--set optimizer.lr=1e-4")
        try:
            _set(words, key.split("."), _number(yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise SurgeryError(f"--set {change}: the value is not YAML: {str(error).splitlines()[0]}.") from None
    return words, file.parent


def checked(kind: type[Kind], words: Mapping[str, Any]) -> Kind:
    """`kind` from its words. Raises `SurgeryError` that names the key, and the nearest right one."""
    try:
        return kind(**words)
    except ValidationError as error:
        raise SurgeryError(_told(kind, error)) from None


def _told(kind: type[BaseModel], error: ValidationError) -> str:
    each = error.errors()
    first = next((e for e in each if e["type"] == "extra_forbidden"), each[0])  # a mistyped key is missing as well
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"The recipe needs the key '{where}'."
    if first["type"] == "extra_forbidden":
        part: Any = kind
        for name in first["loc"][:-1]:
            part = _inner(part, name)
        return f"The recipe has no key '{where}'. {nearest(str(first['loc'][-1]), part.model_fields)}"
    return f"Recipe, {where}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r}."


def _inner(part: Any, name: Any) -> Any:
    """What lies below a key: of a dictionary of parts, the kind of the parts."""
    if not hasattr(part, "model_fields"):  # the key of one part among several: its kind is known already
        return get_args(part)[-1]
    return part.model_fields[name].annotation


def _set(words: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        inner = words.get(name)
        if isinstance(inner, str):  # `objective: grpo` and --set objective.grpo.beta=0
            inner = {inner: {}}
        words[name] = dict(inner) if isinstance(inner, dict) else {}
        words = words[name]
    words[path[-1]] = value


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def packaged() -> dict[str, Recipe]:
    """Every recipe that comes with the package, by name."""
    return {file.stem: load(file) for file in sorted(PACKAGED.glob("*.yaml"))}


def as_words(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain JSON: objects that Python put in are named by what they are."""
    import json

    return json.loads(
        json.dumps(recipe.model_dump(), default=lambda thing: getattr(thing, "name_or_path", None) or str(thing))
    )
