"""What TuCo and alpha-scaling cost, in forward passes of the tuned model, in one run on one thread.

    python experiments/benchmarks/tuco.py                    # GPT-2 small and a small Llama, 7 rounds, about 4 minutes
    python experiments/benchmarks/tuco.py --quick            # 3 rounds of the short prompts
    python experiments/benchmarks/tuco.py --smollm2          # also SmolLM2-135M's shape, where it is installed

Random models of the shape of GPT-2 small (124 M) and of a small Llama (8 layers of width 512, 8 heads on 4 key-value
heads, 32,000 tokens), and a "fine-tuning" of each, noise of a fiftieth of every matrix. 8 prompts of 24 and of 128
tokens. In turn, so that a slow minute of the machine hits all: CPU seconds of the process for

* plain: a forward pass of the tuned model, logits at the last token only: the unit
* two forwards: the same of both models, as the paper counts TuCo's cost
* TuCo, hooks: a hook on each tuned block that calls the base's block on the same arguments
* TuCo; TuCo per token: `tuco(...)`, everything in it
* alpha, hooks; alpha: the scaled forward pass by such hooks, and by `scaled(...)`, entering the context included
* no-op hooks: the plain pass with eight `edit`s a layer that change nothing

FLOPs are counted in the same run (multiplications of matrices): their ratio is the limit, what time would come to if
all of them were equally cheap. The last tokens of 8 prompts are not: the weights have to be read for them all the same,
in the head of the plain pass as in the base's blocks of TuCo, which runs no head and ends in the last block.
Writes `results/tuco.json` and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import surgery
from analysis.tuco import contribution, tuco
from surgery import zoo
from surgery.activations import edit
from surgery.activations.decomposition import scaled
from surgery.anatomy import anatomy_of
from surgery.anatomy.points import first_tensor
from surgery.errors import SurgeryError
from surgery.models import Batch, load

HERE = Path(__file__).parent
ALPHA = 1.2
SITES = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "resid_post")
AIMS = {"GPT-2 small": {"TuCo": 1.2, "alpha": 1.75}, "small Llama": {"TuCo": 1.25, "alpha": 1.75}}
"""Aimed at, for prompts of 24 tokens."""


def gpt2() -> Any:
    """A random GPT-2 small."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def llama() -> Any:
    """A random small Llama with grouped queries."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, max_position_embeddings=1024,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def pair_of(make: Callable[[], Any]) -> tuple[Any, Any]:
    """A model and the same with noise on every matrix."""
    torch.manual_seed(0)
    base = make().eval().requires_grad_(False)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        if parameter.dim() > 1:
            parameter.add_(0.02 * parameter.float().std() * torch.randn_like(parameter))
    return base, tuned


class Arms:
    """What is timed, on one pair and one batch of prompts."""

    def __init__(self, base: Any, tuned: Any, length: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.base, self.tuned = base, tuned
        self.ids = torch.randint(3, base.config.vocab_size, (8, length), generator=generator)
        self.batch = Batch.of(self.ids)

    def forward(self, model: Any) -> Tensor:
        """Logits of the last token."""
        return model(self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    def plain(self) -> Tensor:
        return self.forward(self.tuned)

    def two(self) -> tuple[Tensor, Tensor]:
        return self.forward(self.tuned), self.forward(self.base)

    def hooked(self, alpha: float | None = None, every: bool = False) -> Tensor:
        """TuCo by hooks; with `alpha` the logits of the scaled pass."""
        others, ptc, ftc, handles = anatomy_of(self.base).blocks, [], [], []
        tokens: Any = slice(None) if every else -1

        def hook_of(layer: int) -> Callable[..., Any]:
            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
                stream = args[0] if args else kwargs["hidden_states"]
                would, does = first_tensor(others[layer](*args, **kwargs)), first_tensor(output)
                if alpha is None:
                    ptc.append((would - stream)[:, tokens])
                    ftc.append((does - would)[:, tokens])
                    return None
                new = would + alpha * (does - would)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            return hook

        for layer, block in enumerate(anatomy_of(self.tuned).blocks):
            handles.append(block.register_forward_hook(hook_of(layer), with_kwargs=True))
        try:
            logits = self.forward(self.tuned)
        finally:
            for handle in handles:
                handle.remove()
        return logits if alpha is not None else contribution(torch.stack(ptc), torch.stack(ftc))

    def ours(self, per_token: bool = False) -> np.ndarray:
        found = tuco((self.base, self.tuned), self.batch, per_token=per_token)
        return found.value.values if found.tokens is None else found.tokens.values

    def scaled(self) -> Tensor:
        with scaled((self.base, self.tuned), ALPHA):
            return self.forward(self.tuned)

    def idle(self) -> Tensor:
        with edit(self.tuned, dict.fromkeys(SITES, lambda value: None)):
            return self.forward(self.tuned)

    @property
    def all(self) -> dict[str, Callable[[], Any]]:
        """By name; the first is the unit."""
        return {
            "plain": self.plain, "two forwards": self.two, "TuCo, hooks": self.hooked, "TuCo": self.ours,
            "TuCo per token": lambda: self.ours(True), "alpha, hooks": lambda: self.hooked(ALPHA),
            "alpha": self.scaled, "no-op hooks": self.idle,
        }  # fmt: skip

    def differences(self) -> dict[str, float]:
        """The largest difference from the plain hooks: of TuCo, and of logits over their scale."""
        logits = self.hooked(ALPHA)
        return {
            "TuCo": float(np.abs(self.ours() - self.hooked().numpy()).max()),
            "TuCo per token": float(np.abs(self.ours(True) - self.hooked(every=True).numpy()).max()),
            "alpha": float((self.scaled() - logits).abs().max() / logits.abs().max()),
            "no-op hooks": float((self.idle() - self.plain()).abs().max()),
        }


def flops(function: Callable[[], Any]) -> int:
    """Floating point operations in multiplications of matrices."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure(name: str, pair: tuple[Any, Any], length: int, rounds: int) -> dict[str, Any]:
    """Seconds of every arm in every round, and what they come to."""
    arms = Arms(*pair, length)
    differences = arms.differences()  # which also warms up
    counted = {arm: flops(run) for arm, run in arms.all.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms.all}
    for _ in range(rounds):
        for arm, run in arms.all.items():
            began = time.process_time()
            run()
            seconds[arm].append(time.process_time() - began)
    least = {arm: min(each) for arm, each in seconds.items()}
    middle = {arm: statistics.median(each) for arm, each in seconds.items()}
    return {
        "model": name, "prompts": 8, "tokens": length, "seconds": seconds, "min": least, "median": middle,
        "ratio": {arm: least[arm] / least["plain"] for arm in least},
        "ratio_of_medians": {arm: middle[arm] / middle["plain"] for arm in middle},
        "flops": counted, "flop_ratio": {arm: counted[arm] / counted["plain"] for arm in counted},
        "largest_difference": differences,
    }  # fmt: skip


HEAD = (
    "| model | tokens | arm | CPU s, least | forwards, of least | of medians | of FLOPs | aim | difference |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def lines(row: dict[str, Any]) -> list[str]:
    """Rows of the Markdown table."""
    found = []
    for arm, seconds in row["min"].items():
        aim = AIMS.get(row["model"], {}).get(arm) if row["tokens"] == 24 else None
        difference = row["largest_difference"].get(arm)
        cells = [row["model"], f"8 x {row['tokens']}", arm, f"{seconds:.3f}", f"{row['ratio'][arm]:.2f}",
                 f"{row['ratio_of_medians'][arm]:.2f}", f"{row['flop_ratio'][arm]:.2f}", f"{aim:.2f}" if aim else "",
                 "" if difference is None else f"{difference:.0e}"]  # fmt: skip
        found.append("| " + " | ".join(cells) + " |")
    return found


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 rounds of the short prompts")
    parser.add_argument("--smollm2", action="store_true", help="also SmolLM2-135M with noise for a fine-tuning")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "tuco.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    models: dict[str, Callable[[], Any]] = {"GPT-2 small": gpt2, "small Llama": llama}
    if args.smollm2:
        models["SmolLM2-135M"] = lambda: load(zoo.get("smollm2"), "float32")[0]
    rows: list[dict[str, Any]] = []
    load_before = os.getloadavg()[0]
    print(HEAD, flush=True)
    for name, make in models.items():
        try:
            pair = pair_of(make)
        except SurgeryError as error:
            print(f"{name} is left out: {error}")
            continue
        for length in (24,) if args.quick else (24, 128):
            rows.append(measure(name, pair, length, 3 if args.quick else args.rounds))
            print("\n".join(lines(rows[-1])), flush=True)
    report = {
        "threads": 1, "rounds": 3 if args.quick else args.rounds, "alpha": ALPHA, "aims": AIMS, "rows": rows,
        "cores": os.cpu_count(), "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "surgery": surgery.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    if not args.quick:
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
