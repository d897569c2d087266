"""What the tests start with torchrun: `parallel_script.py FOLDER PARALLEL`, all runs of `RUNS[PARALLEL]` in one go."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from tiny_runs import demonstrations, llama, many_letters, pairs, tokenizer

from surgery.errors import SurgeryError
from surgery.training import train

SFT = {"objective": "sft", "data": demonstrations(), "batch": {"rows": 7, "micro_batch": 2}, "steps": 4}
GRPO = {
    "objective": {"grpo": {"beta": 0.05}},
    "data": demonstrations(),
    "reward": many_letters,
    "batch": {"micro_batch": 4},
    "rollouts": {"prompts": 3, "group": 4, "max_new_tokens": 6},
    "steps": 4,
}
DPO = {"objective": "dpo", "data": pairs(), "batch": {"rows": 5, "micro_batch": 2}, "steps": 4}
RUNS = {
    "ddp": {
        "sft": SFT,
        "grpo": GRPO | {"batch": {"epochs": 2, "minibatches": 3}, "evaluate": {"every": 2, "n": 5}, "steps": 6},
        "one_group": GRPO | {"rollouts": {"prompts": 1, "group": 4, "max_new_tokens": 6}},
        "frozen": SFT | {"trainable": ["*mlp*"]},
        "lift": SFT | {"tuning": {"lift": {"density": 0.2, "rank": 4, "refresh": 2}}},
        "fisher": GRPO | {"tuning": {"fisher": {"density": 0.1, "scope": "global"}}},
        "halves": SFT | {"tuning": {"half": {"refresh": 2}}},
        "both": GRPO | {"objective": [{"dapo": {}}, {"sft": {}, "weight": 0.3}], "demonstrations": demonstrations()},
    },
    "fsdp2": {
        "sft": SFT | {"evaluate": {"every": 2, "n": 5}, "checkpoint": {"every": 1}},
        "dpo": DPO,
        "checkpointing": SFT | {"gradient_checkpointing": True, "optimizer": {"lr": 3e-2, "eps": 1e-2, "clip": 0.1}},
        "half": SFT | {"precision": "bfloat16"},
    },
}  # fmt: skip


def run(name: str, parallel: str, out: Path, *, alone: bool = False, **more: object) -> object:
    """One of the runs, by several processes or by one alone."""
    # a large eps: Adam makes steps of full size of gradients that are nothing but rounding
    words = (
        {"optimizer": {"lr": 3e-2, "eps": 1e-2}, "parallel": "none" if alone else parallel}
        | RUNS[parallel][name]
        | more
    )
    return train(llama(), tokenizer(), out=out, **words)


class Stop(Exception):
    """In place of a kill."""


def _stop(step: int, _: object) -> None:
    if step == 3:
        raise Stop


def failing(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """A reward that raises on the last process alone."""
    if os.environ["RANK"] != "0":
        raise ValueError("the judge has gone")
    return [0.0] * len(completions)


def main(folder: Path, parallel: str) -> None:
    """Every run; one of them stopped and resumed; one that goes wrong on one process."""
    for name in RUNS[parallel]:
        if parallel == "fsdp2" and name == "sft":
            try:
                run(name, parallel, folder / name, on_step=_stop)
            except Stop:
                run(name, parallel, folder / name, resume=True)
        else:
            run(name, parallel, folder / name)
    if parallel == "ddp":
        try:
            run("grpo", parallel, folder / "failing", reward=failing)
        except SurgeryError as error:
            (folder / f"told-{os.environ['RANK']}").write_text(str(error))
    else:
        try:
            run("sft", parallel, folder / "masked", tuning="lift")
        except SurgeryError as error:
            (folder / f"told-{os.environ['RANK']}").write_text(str(error))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
