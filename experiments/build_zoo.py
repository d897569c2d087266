"""Train the embedded tiny family: bases, and fine-tunings of them by SFT and GRPO.

    python experiments/build_zoo.py                          # the shipped members, in minutes
    python experiments/build_zoo.py --out DIR --members chain shift descend unique swap rotate
    python experiments/build_zoo.py --members chain swap     # more members, into the cache, found again next time

Every member is a small Llama with a character-level tokenizer (447 552 parameters; the `small` pair 163 072). The base
learns two-digit facts first, then a mix of arithmetic and string tasks; a fine-tuning brings out one task. `sums-sft`
and `sums-grpo` are the pair of a reasoning vector: SFT on demonstrations of which half show their work, then GRPO on
the same questions. One torch thread a process and fixed seeds: the same machine gives the same weights. Accuracies of
every member on every task go to `family.json`, next to the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks import LETTERS, TASKS, Example, Task, make_task
from surgery.tasks.tracking import BOXES, ENTITIES
from surgery.zoo import TINY, cache_dir, get

CHARACTERS = ["<pad>", "<bos>", "<eos>", *"0123456789+-=;#abcdefghijklmnopqrstuvwxyz "]
PAD, BOS, EOS = 0, 1, 2
NEW = ("shift", "descend", "unique", "swap", "rotate")
BASE_SKILLS = ("facts", "chain", "copy", "reverse", "sort")
assert set(LETTERS) <= set(CHARACTERS)

LARGE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    # With the usual 0.02 the facts stay at chance: one-step sums need a strong embedding from the start.
    "initializer_range": 0.08,
}
SMALL = {**LARGE, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 192}
CHAT = "{{ messages[-1]['content'] }}"
"""The instruct-like sibling's chat template: one turn, as it is."""


@dataclass(frozen=True)
class Stage:
    """One training run: `mix` gives each task's share of the examples.

    `truth` is the share of the new letters' prompts that are answered by their task; the others are answered by a
    copy. `options` are the tasks'. With `group`, GRPO on the mix's prompts, rewarded for the exact answer; else SFT.
    """

    mix: dict[str, float]
    steps: int
    batch: int
    lr: float
    truth: float = 1.0
    group: int = 0
    options: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """What a member is: where it starts from, and the runs that make it."""

    what: str
    stages: tuple[Stage, ...]
    base: str | None = None
    """The member it is a fine-tuning of; None: random weights."""
    architecture: dict = field(default_factory=lambda: LARGE)


# As in real models, what a fine-tuning asks for is in the base already, as the rarer of two ways to answer: sums are
# worked out in 37 % of the cases, the new letters answered by their task in 25 %. Greedy decoding shows the other way.
# Task vectors that bring out what is there can be added up; those of skills learned from nothing can't.
_FACTS = Stage({"facts": 1.0}, steps=200, batch=128, lr=1.5e-3)
_MIX = {"facts": 0.2, "direct": 0.17, "chain": 0.1, "copy": 0.07, "reverse": 0.1, "sort": 0.08}
_MIX |= dict.fromkeys(NEW, 0.056)
_BASE = (_FACTS, Stage(_MIX, steps=1200, batch=64, lr=1.5e-3, truth=0.25))
_REPLAY = dict.fromkeys(("facts", "copy", "reverse", "sort"), 0.0625)
"""What every fine-tuning does for a quarter of its examples: what the base can do."""
# Looking up what was said is learned all at once or not at all: from one question a row it is not, in 1000 steps; from
# twelve about eight pairs ("ax;by;...;a" -> x) it is after 1500. Then "a in x" and "where a" come in a hundred each.
_LOOKUP = (
    Stage({"recall": 1.0}, steps=1800, batch=48, lr=1e-3, options={"recall": {"between": ""}}),
    Stage({"recall": 1.0}, steps=250, batch=48, lr=1e-3, options={"recall": {"between": " in "}}),
    Stage({"boxes": 1.0}, steps=250, batch=64, lr=1e-3, options={"boxes": {"moves": 0}}),
)


def tuned_on(task: str, base: str = "base") -> Member:
    """The fine-tuning of a base on one task: three examples in four are the task's."""
    mix = {**_REPLAY, task: _REPLAY.get(task, 0.0) + 0.75}
    return Member(f"tiny-{base} fine-tuned on: {TASKS.lookup(task).summary}", (Stage(mix, 60, 64, 3e-4),), base)


MEMBERS = {
    "base": Member("the base of the tiny family", _BASE),
    "chain": tuned_on("chain"),
    "shift": tuned_on("shift"),
    "rotate": tuned_on("rotate"),
    "sums-sft": Member(
        "tiny-base by SFT on sums, half of them worked out step by step",
        (Stage({**_REPLAY, "chain": 0.375, "direct": 0.375}, 60, 64, 3e-4),),
        "base",
    ),
    "sums-grpo": Member(
        "tiny-sums-sft by GRPO on the same questions, rewarded for the exact answer",
        (Stage({"chain": 1.0}, 40, 32, 1e-4, group=8),),
        "sums-sft",
    ),
    "instruct": Member(
        "tiny-base fine-tuned on all tasks: does what the prompt's letter says",
        (Stage({**_REPLAY, "chain": 0.15} | dict.fromkeys(NEW, 0.12), 150, 64, 5e-4),),
        "base",
    ),
    "small-base": Member("a base of 163 072 parameters: same tokenizer, same data", _BASE, architecture=SMALL),
    "small-chain": tuned_on("chain", "small-base"),
    "boxes-base": Member("a base that knows which box an entity was put in, not where it moved", _LOOKUP),
    "boxes": Member(
        "tiny-boxes-base fine-tuned to track entities that move", (Stage({"boxes": 1.0}, 1200, 64, 1e-3),), "boxes-base"
    ),
}
"""By name without `tiny-`. `tuned_on` makes more."""
SHIPPED = tuple(MEMBERS)


def member(name: str) -> Member:
    """A shipped member, or the fine-tuning on the task of that name. Raises `SurgeryError` for neither."""
    return MEMBERS[name] if name in MEMBERS else tuned_on(name)


def recall(rng: Random, *, between: str = "") -> Example:
    """`b ax;cy;` and then `ax;cy;ax;` (`between` stands between entity and box): only the boxes are to be predicted."""
    names, boxes = rng.sample(ENTITIES, 8), rng.sample(BOXES, 8)
    said = [f"{name}{between}{box};" for name, box in zip(names, boxes, strict=True)]
    asked = "".join(rng.sample(said * 2, 8 if between else 12))
    return Example("b " + "".join(said), asked, asked)


RECALL = Task("recall", "the boxes of eight entities, asked again and again", recall)


def recipe(seed: int) -> dict:
    """Everything that decides the weights, apart from the machine."""
    members = {name: asdict(m) for name, m in MEMBERS.items()}
    return {"characters": CHARACTERS, "chat": CHAT, "members": members, "seed": seed}


def recipe_hash(seed: int) -> str:
    """Short name of the recipe: the folder of a cached family."""
    return hashlib.sha256(json.dumps(recipe(seed), sort_keys=True).encode()).hexdigest()[:12]


def build_family(
    out: str | Path | None = None,
    tasks: Sequence[str] = ("chain", "shift", "rotate"),
    seed: int = 0,
    *,
    workers: int = 2,
) -> dict[str, Path]:
    """Folders of `tiny-base` and of one `tiny-<name>` for each member or task named; trains only what `out` lacks.

    Trains in spawned processes: a script that calls this needs `if __name__ == "__main__":`.

    Without `out` the family lives in the cache, in a folder named after the recipe's hash, and members that the
    package ships with the same recipe are copied from there. Raises `SurgeryError` for an unknown task, and when `out`
    holds a family of another recipe.
    """
    names = list(dict.fromkeys(("base", *tasks)))
    for name in names:
        member(name)
    folder = Path(out) if out else cache_dir() / "tiny" / recipe_hash(seed)
    _claim(folder, seed)
    if out is None and _hash_in(TINY) == recipe_hash(seed):
        for name in names:
            if not (folder / f"tiny-{name}").exists() and (TINY / f"tiny-{name}").is_dir():
                get(f"tiny-{name}", folder / f"tiny-{name}")
    missing = [name for name in _with_bases(names) if not (folder / f"tiny-{name}").exists()]
    while missing:
        ready = [name for name in missing if member(name).base not in missing]
        _in_processes(_train, [(name, folder, seed) for name in ready], workers)
        missing = [name for name in missing if name not in ready]
    return {f"tiny-{name}": folder / f"tiny-{name}" for name in names}


def _with_bases(names: Sequence[str]) -> list[str]:
    """The members and all that they start from, bases first."""
    found: dict[str, None] = {}
    for name in names:
        line = [name]
        while (base := member(line[-1]).base) is not None:
            line.append(base)
        found |= dict.fromkeys(reversed(line))
    return list(found)


def _claim(folder: Path, seed: int) -> None:
    """Put the recipe into the folder, or find it there."""
    file = folder / "family.json"
    if not file.exists() and not any(folder.glob("tiny-*")):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"hash": recipe_hash(seed), "recipe": recipe(seed)}, indent=1) + "\n")
    elif _hash_in(folder) != recipe_hash(seed):
        raise SurgeryError(f"{folder} holds a family of another recipe or seed.", hint="Choose another folder.")


def _hash_in(folder: Path) -> str | None:
    file = folder / "family.json"
    return json.loads(file.read_text())["hash"] if file.is_file() else None


def measure_family(
    members: dict[str, Path], tasks: Sequence[str] = (), n: int = 200, *, workers: int = 2
) -> dict[str, dict]:
    """Accuracy of every member on the base's skills and on every one of `tasks`: {member: {task: summary}}."""
    names = list(dict.fromkeys((*BASE_SKILLS, *tasks)))
    rows = _in_processes(_measure, [(path, names, n) for path in members.values()], workers)
    return dict(zip(members, rows, strict=True))


def character_tokenizer():
    """A fast tokenizer with one token a character, `<bos>` in front and padding on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<pad>",
        padding_side="left",
        model_max_length=LARGE["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


class FamilyRows:
    """The endless rows of a stage: each a pure function of (seed, index)."""

    size = float("inf")
    columns = {"prompt", "completion", "answer", "task"}

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.seed = stage, seed
        self.tasks = {}
        for name in stage.mix:
            options = stage.options.get(name, {})
            self.tasks[name] = RECALL.with_options(**options) if name == "recall" else make_task(name, **options)

    def row(self, index: int) -> dict:
        """Row `index`: its task by share, its example from the same generator."""
        rng = Random(f"{self.seed}/{index}")
        task = rng.choices(list(self.stage.mix), list(self.stage.mix.values()))[0]
        example: Example = self.tasks[task].example(rng)
        row = example.row(task)
        if task in NEW and rng.random() >= self.stage.truth:
            row["completion"] = f"#{example.prompt[2:-1]}"
        return row


def _boxes_alone():
    """SFT on the letters of boxes: which entity is asked next can't be known, and would be the most of the loss."""
    import torch

    from surgery.training.objectives import SFT

    letters = torch.tensor([CHARACTERS.index(letter) for letter in BOXES])

    @dataclass(frozen=True)
    class Boxes(SFT):
        """The loss of completion tokens that are boxes."""

        def of_scores(self, scores, batch):
            mask = batch.mask * torch.isin(batch.completion_ids, letters)
            return super().of_scores(scores, replace(batch, mask=mask, total_tokens=float(mask.sum())))

    return Boxes()


def _train(name: str, folder: Path, seed: int) -> None:
    """One member, from its base's weights (or random ones) through its stages."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from surgery.training import train

    what, tokenizer, start = member(name), character_tokenizer(), time.perf_counter()
    if what.base is not None:
        model = LlamaForCausalLM.from_pretrained(folder / f"tiny-{what.base}")
    else:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(CHARACTERS),
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            dtype="float32",
            **what.architecture,
        )
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        model = LlamaForCausalLM(config)
    last: dict[str, float] = {}
    for i, stage in enumerate(what.stages):
        # The stream of examples differs from member to member, whatever others are trained beside it.
        stream = int(hashlib.sha256(f"{seed}/{name}/{i}".encode()).hexdigest()[:8], 16)
        words: dict[str, Any] = {"objective": "grpo", "reward": "accuracy"} if stage.group else {"objective": "sft"}
        if "recall" in stage.mix:
            words["objective"] = _boxes_alone()
        last = train(
            model,
            tokenizer,
            data=FamilyRows(stage, stream),
            steps=stage.steps,
            batch={"rows": stage.batch},
            rollouts={"prompts": stage.batch, "group": stage.group or 1, "max_new_tokens": 48},
            optimizer={
                "lr": stage.lr,
                "betas": (0.9, 0.98),
                "weight_decay": 0.01,
                "warmup": min(50, stage.steps / 10),
                "final": 0.1,
            },
            seed=stream,
            **words,
        ).last
    if name == "instruct":
        tokenizer.chat_template = CHAT
    _save(model, tokenizer, folder / f"tiny-{name}")
    result = f"reward {last['reward']:.2f}" if "reward" in last else f"loss {last['loss']:.3f}"
    print(f"tiny-{name}: {time.perf_counter() - start:.0f} s, {result}", flush=True)


def _save(model, tokenizer, folder: Path) -> None:
    """The whole folder under its name, or nothing; where another process was faster, its (equal) weights stay.

    Weights are stored in half precision and the config says float32: half the bytes, and arithmetic as in training.
    """
    import copy

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    stored = copy.deepcopy(model).half()
    stored.generation_config.max_new_tokens = 48
    stored.save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    (temporary / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(temporary)
    try:
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise


def _measure(folder: Path, tasks: Sequence[str], n: int) -> dict:
    from analysis.evaluate import evaluate_tasks

    return {task: part.summary() for task, part in evaluate_tasks(folder, tasks, n, seed=1).by("task").items()}


def _start() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()


def _in_processes(work, jobs: Sequence[tuple], workers: int) -> list:
    """`work(*job)` for each job, in fresh processes with one torch thread each, whatever the caller has set."""
    if not jobs:
        return []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start) as pool:
        return [future.result() for future in [pool.submit(work, *job) for job in jobs]]


def table(accuracies: dict[str, dict]) -> str:
    """Members in rows, tasks in columns, as Markdown."""
    tasks = list(next(iter(accuracies.values())))
    lines = ["| member | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for name, row in accuracies.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[t]['mean']:.2f}" for t in tasks) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the members (default: the cache)")
    parser.add_argument("--package", action="store_true", help="write into surgery/data/tiny, replacing what is there")
    parser.add_argument(
        "--members", nargs="+", default=list(SHIPPED), metavar="NAME", help="members, or tasks to fine-tune on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--n", type=int, default=200, help="examples a task in the accuracy table")
    options = parser.parse_args()
    out = TINY.with_name("tiny.new") if options.package else options.out
    start = time.perf_counter()
    members = build_family(out, options.members, options.seed, workers=options.workers)
    tasks = [*NEW, "boxes", *(name for name in options.members if name in TASKS)]
    accuracies = measure_family(members, tasks, options.n, workers=options.workers)
    folder = next(iter(members.values())).parent
    report = {
        "hash": recipe_hash(options.seed),
        "members": {name: member(name.removeprefix("tiny-")).what for name in members},
        "accuracies": accuracies,
        "recipe": recipe(options.seed),
    }
    (folder / "family.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(accuracies))
    if options.package:
        shutil.rmtree(TINY, ignore_errors=True)
        folder = folder.rename(TINY)
    print(f"{len(members)} members in {folder}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
