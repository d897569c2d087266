"""Two full fine-tunings of SmolLM2-135M-Instruct, on GSM8K and on SVAMP: a real family of one base, in minutes on two
cores.

    SURGERY_DATA=... python experiments/finetune_smollm2.py --out DIR

Writes DIR/base (the instruct model in bfloat16), DIR/gsm8k, DIR/svamp, and DIR/finetune.json: for each model and each
data set the log-likelihood of held-out answers and greedy accuracy. Weights, activations and gradients are bfloat16;
AdamW works on a float32 copy, without which most updates would round to nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch

from analysis.evaluate import accuracy, answer_log_likelihood, load, perplexity, prompt_ids
from analysis.results import Result
from surgery.tasks import Example, gsm8k, same_number, svamp
from surgery.zoo import cache_dir, get

DATA = {"gsm8k": gsm8k, "svamp": svamp}
HELD_OUT = {"gsm8k": 60, "svamp": 100}
MAX_NEW_TOKENS = 300  # the base is wordy: with 120, more than half of its answers were cut off


def rows(tokenizer, examples: list[Example], longest: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids in the chat template, response ids and end mark) of the examples with at most `longest` tokens."""
    found = []
    for e in examples:
        prompt = prompt_ids(tokenizer, e.prompt, chat=True)
        response = tokenizer(e.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) + len(response) <= longest:
            found.append((prompt, response))
    return found


def batches(data: list, steps: int, size: int, rng: Random):
    """`steps` batches of similar length in random order, epoch after epoch."""
    made = 0
    while made < steps:
        shuffled = sorted(rng.sample(data, len(data)), key=lambda row: len(row[0]) + len(row[1]))
        epoch = [shuffled[i : i + size] for i in range(0, len(shuffled) - size + 1, size)]
        rng.shuffle(epoch)
        for batch in epoch[: steps - made]:
            made += 1
            yield batch


def loss_of(model, batch) -> torch.Tensor:
    """Mean cross-entropy of the response tokens; only their logits are computed, in float32."""
    width = max(len(p) + len(r) for p, r in batch)
    ids = torch.tensor([[*p, *r] + [0] * (width - len(p) - len(r)) for p, r in batch])
    mask = torch.tensor([[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in batch])
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, r) in enumerate(batch):
        scored[i, len(p) - 1 : len(p) + len(r) - 1] = True
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[scored]
    logits = model.get_output_embeddings()(hidden).float()
    return torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[scored])


def finetune(model, data: list, *, steps: int, size: int, lr: float, seed: int, name: str) -> list[float]:
    """AdamW on a float32 copy of the weights; warm-up, then a cosine to 10 %. Returns the losses."""
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    losses, start = [], time.perf_counter()
    model.train()
    for step, batch in enumerate(batches(data, steps, size, Random(seed))):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine * min(1.0, (step + 1) / 10)
        loss = loss_of(model, batch)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            recent = sum(losses[-10:]) / 10
            print(f"{name} step {step + 1} loss {recent:.3f} ({time.perf_counter() - start:.0f} s)", flush=True)
    model.eval()
    return losses


def make(out: Path, name: str, options: argparse.Namespace) -> None:
    """Train the fine-tuning `name` and save it, whole or not at all; `results` says how it went."""
    model, tokenizer = load(out / "base")
    data = rows(tokenizer, DATA[name]("train"), options.longest)
    start = time.perf_counter()
    losses = finetune(model, data, steps=options.steps, size=options.batch, lr=options.lr, seed=options.seed, name=name)
    said = {
        "examples": len(data),
        "seconds": round(time.perf_counter() - start),
        "losses": [round(loss, 4) for loss in losses],
    }
    (out / "results").mkdir(exist_ok=True)
    training_record(out, name).write_text(json.dumps(said, indent=1) + "\n")
    temporary = out / f".{name}.{os.getpid()}"
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, out / name)


def cached(recipe: Mapping[str, Any]) -> Path:
    """The folder of a fine-tuning in the cache, trained when it is not there, with `training.json` of how it went.

    `recipe`: data, steps, size, lr, seed, longest.
    """
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_dir() / f"smollm2-{recipe['data']}-{name}"
    if not folder.is_dir():
        words: dict[str, Any] = {k: v for k, v in recipe.items() if k not in ("data", "longest")}
        data = DATA[recipe["data"]]("train")
        model, tokenizer = load(get("smollm2"))
        began = time.process_time()
        losses = finetune(model, rows(tokenizer, data, int(recipe["longest"])), name=folder.name, **words)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        said = {"recipe": dict(recipe), "losses": losses, "cpu_seconds": time.process_time() - began}
        (temporary / "training.json").write_text(json.dumps(said) + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    return folder


def training_record(out: Path, name: str) -> Path:
    return out / "results" / f"{name}-training.json"


def measure(folder: Path) -> dict[str, dict]:
    """Log-likelihood and accuracy on each data set: {data set: summary}; saves the values by example too."""
    model, tokenizer = load(folder)
    found = {}
    for name, data in DATA.items():
        examples = data("test", HELD_OUT[name])
        prompts, responses = [e.prompt for e in examples], [e.response for e in examples]
        likely = answer_log_likelihood(model, tokenizer, prompts, responses, chat=True, batch_size=8)
        right = accuracy(
            model, tokenizer, examples, same_number, chat=True, batch_size=20, max_new_tokens=MAX_NEW_TOKENS
        )
        for kind, result in (("likelihood", likely), ("accuracy", right)):
            result.save(folder.parent / "results" / f"{folder.name}-on-{name}-{kind}")
        print(f"{folder.name} on {name}: {likely}; {right}", flush=True)
        found[name] = {
            "log_likelihood": likely.summary(),
            "perplexity": perplexity(likely),
            "accuracy": right.summary(),
        }
    return found


def compare(folder: Path, name: str, kind: str) -> dict:
    """Paired test of the fine-tuned model `name` against the base on its own data."""
    tuned, base = (Result.load(folder / "results" / f"{m}-on-{name}-{kind}") for m in (name, "base"))
    test = tuned.paired_test(base)
    return {"difference": float(test.difference), "p_value": float(test.p_value), "n": test.n}


def start() -> None:
    """One torch thread a process: on a busy machine two processes do better than one with two threads."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models; outside the repository")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--longest", type=int, default=160, help="tokens; longer training examples are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, one torch thread each (about 6 GB each)")
    options = parser.parse_args()
    out = options.out

    if not (out / "base").exists():
        get("smollm2", out / "base", dtype="bfloat16")
    report: dict = {"options": {k: v for k, v in vars(options).items() if k != "out"}}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context, initializer=start) as pool:
        # A model that is there already is taken as it is: an interrupted run goes on.
        for job in [pool.submit(make, out, name, options) for name in DATA if not (out / name).exists()]:
            job.result()
        report["training"] = {name: json.loads(training_record(out, name).read_text()) for name in DATA}
        measuring = {name: pool.submit(measure, out / name) for name in ("base", *DATA)}
        report["models"] = {name: job.result() for name, job in measuring.items()}
    report["tests"] = {n: {k: compare(out, n, k) for k in ("likelihood", "accuracy")} for n in DATA}
    (out / "finetune.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["tests"], indent=1))


if __name__ == "__main__":
    main()
