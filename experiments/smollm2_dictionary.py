"""A dictionary of a real model's middle layer: how much does it rebuild, and which features did a fine-tuning change?

    SURGERY_DATA=... python experiments/smollm2_dictionary.py     # the fine-tuning is kept in the cache
    python experiments/smollm2_dictionary.py --fast               # tiny-base and tiny-chain: a check that it runs

SmolLM2-135M-Instruct in float32 and its short fine-tuning on GSM8K (`finetune_smollm2.py`), read behind layer 14 of 30
on the same tokens: 450 problems of GSM8K with their solutions in the chat template, and 350 passages of Shakespeare's
plays, read once and kept on disk. The first token, and what stands before every problem, do not count. Over these
rows, at once and one seed each:

* a dictionary of the base: 2048 latents, BatchTopK with k = 32. Controls on held-out text: the 32 principal components
  of the same rows; random directions, the 32 largest, with the one factor that fits the training rows best.
* a crosscoder of both models, of the same size and k
* a dictionary of the differences, 1024 latents, k = 16; control: the 16 principal components of the differences

Held-out are 40 problems of GSM8K's test split and, token for token as long, 40 passages of the last tenth of the plays.
Sinks, rows more than 10 times as long as the median, are left out of training, and texts that have one are not held
out. (A first run had them: 28 rows, all within passages, held three quarters of the variance, hundreds of latents were
active nowhere else, and most of those that changed were most active there.)
CE and KL are those of the base when reconstructions stand in for the activations of 6 texts of each kind, against the
ablations zero and mean. A latent is changed when the difference of its firing rate, tuned less base, over the texts of
a kind is away from 0 by a t test at 0.05 over the number of latents (Bonferroni). How much a text changed: the sum over
latents of the absolute difference of the tokens at which they fire, over the sum of both, 0 to 1.

VERDICTS, written before anything was scored:
* the dictionary beats its controls: "held" when its FVU is below both controls' on both kinds of text and its CE nearer
  to the model's own than theirs; "in part" when one of the two is so; else "did not hold".
* the features of the text it was tuned on changed more: "held" when the 95 % interval of a problem's change less a
  passage's (Welch) is above 0, "the other way round" when below, else "no clear difference".
* fine-tuning made features of its own: "held" when a latent of the crosscoder, used on 20 held-out rows or more, has a
  relative norm above 0.9 and both nu at most 0.2; else "did not hold". What only looked so is told.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import one_thread, rounded, write
from finetune_smollm2 import cached
from smollm2_dictionary_told import markdown, picture
from smollm2_logits import RECIPES
from torch import Tensor

from analysis.features import KINDS, Changed, Reader, changed, examples, latent_scaling
from surgery.errors import SurgeryError
from surgery.models import Batch, encoded_prompts, load
from surgery.models.batch import tokenized
from surgery.sae.activations import Keep, Rows, Stream
from surgery.sae.cache import Cached
from surgery.sae.cache import write as keep_activations
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import Quality, measure
from surgery.sae.rules import BatchTopK, Standard, TopK
from surgery.sae.spliced import losses_recovered
from surgery.sae.train import Entry, Settings, fit
from surgery.tasks import TASKS, Example, gsm8k

Ids = list[list[int]]
CONTROLS = ("principal components", "random directions")
EDGE, PASSES, ROWS, ALPHA, SINK = 0.9, 0.2, 20, 0.05, 10.0


@dataclass(frozen=True)
class Setting:
    """Two models, the texts of two kinds (the tuned one's first), and how dictionaries are trained on them."""

    base: Any
    tuned: Any
    tokenizer: Any
    site: str
    texts: Mapping[str, Ids]
    held_out: Mapping[str, Ids]
    prefix: int
    """Tokens that stand before every problem."""
    latents: int
    k: int
    steps: int
    batch: int
    spliced: int
    """Texts of each kind that CE is asked on."""

    @property
    def keep(self) -> Keep:
        """The first token does not count, nor what stands before every problem."""
        (first, *_) = self.texts.values()
        prefix = torch.tensor(first[0][: self.prefix])

        def keep(batch: Batch) -> Tensor:
            same = batch.ids[:, : self.prefix].shape[1] == self.prefix and self.prefix > 0
            begins = (batch.ids[:, : self.prefix] == prefix).all(1) if same else torch.zeros(len(batch)) > 0
            return batch.mask & (batch.positions >= torch.where(begins, self.prefix, 1).clamp(min=1)[:, None])

        return keep

    def stream(self, models: Sequence[Any], texts: Ids) -> Stream:
        """Rows of the texts, in batches of like length."""
        by_length = sorted(texts, key=len)
        batches = [by_length[i : i + 16] for i in range(0, len(by_length), 16)]
        return Stream(list(models), [self.site], batches, self.keep, self.tokenizer)

    def read(self, texts: Ids, longest: float) -> list[tuple[list[int], Tensor]]:
        """Texts and their rows in both models; not those of which a row of the base is longer than `longest`."""
        found = []
        for ids in texts:
            (rows,) = self.stream([self.base, self.tuned], [ids])
            found.append((ids, rows[self.site]))
        half = self.base.config.hidden_size
        return [(ids, x) for ids, x in found if float(x[:, :half].norm(dim=1).max()) <= longest]


def answered(tokenizer: Any, problems: Sequence[Example], chat: bool) -> Ids:
    """Problems with their solutions and the end mark, as tokens."""
    asked = encoded_prompts(tokenizer, [e.prompt for e in problems], chat)
    said = tokenized(tokenizer, [e.response for e in problems], special=False)
    return [[*a, *b, tokenizer.eos_token_id] for a, b in zip(asked, said, strict=True)]


def cut(tokenizer: Any, text: str, widths: Sequence[int]) -> Ids:
    """Passages of these widths, spread evenly over a text."""
    (ids,) = tokenized(tokenizer, [text], special=False)
    starts = [(len(ids) - max(widths)) * i // len(widths) for i in range(len(widths))]
    return [ids[at : at + width] for at, width in zip(starts, widths, strict=True)]


def real() -> Setting:
    """SmolLM2. Raises `SurgeryError` without the data."""
    learned, asked = gsm8k("train", 450), gsm8k("test", 40)
    path = Path(os.environ.get("SURGERY_DATA", "")) / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        raise SurgeryError("Shakespeare's plays are missing.", hint="SURGERY_DATA holds tinyshakespeare/input.txt.")
    plays = path.read_text("utf-8")
    end = len(plays) * 9 // 10
    base, tokenizer = load("smollm2", dtype="float32")
    tuned, _ = load(cached(RECIPES["gsm8k"]), dtype="float32")
    texts = {"GSM8K": answered(tokenizer, learned, True), "plays": cut(tokenizer, plays[:end], [160] * 350)}
    held = answered(tokenizer, asked, True)
    prefix = len(os.path.commonprefix([*texts["GSM8K"], *held]))
    held_out = {"GSM8K": held, "plays": cut(tokenizer, plays[end:], [len(ids) - prefix + 1 for ids in held])}
    return Setting(base, tuned, tokenizer, "resid_post.14", texts, held_out, prefix, 2048, 32, 400, 1024, 6)


def tiny() -> Setting:
    """The same shapes in seconds."""
    base, tokenizer = load("tiny-base", dtype="float32")
    tuned, _ = load("tiny-chain", dtype="float32")
    drawn = {name: answered(tokenizer, TASKS.lookup(name).examples(160, 1), False) for name in ("chain", "copy")}
    texts, held = ({n: ids[a:b] for n, ids in drawn.items()} for a, b in ((0, 120), (120, 160)))
    return Setting(base, tuned, tokenizer, "resid_post.1", texts, held, 0, 192, 8, 60, 128, 6)


@contextmanager
def activations(one: Setting, folder: Path | None) -> Iterator[Cached]:
    """Rows of base and tuned side by side, from `folder` if they are there; without one they are gone afterwards."""
    kept = folder or Path(tempfile.mkdtemp()) / "activations"
    try:
        if not kept.exists():
            texts = [ids for each in one.texts.values() for ids in each]
            keep_activations(one.stream([one.base, one.tuned], texts), kept)
        yield Cached(kept, models=[one.base, one.tuned], tokenizer=one.tokenizer)
    finally:
        if folder is None:
            shutil.rmtree(kept.parent)


# ---- dictionaries


def read_as(site: str, batches: Iterator[Rows], longest: float) -> Iterator[Rows]:
    """The base's rows, both models', and the differences, without sinks."""
    for rows in batches:
        pair = rows[site]
        pair = pair[pair.chunk(2, dim=1)[0].norm(dim=1) <= longest]
        base, tuned = pair.chunk(2, dim=1)
        yield {"base": base.contiguous(), "pair": pair, "difference": tuned - base}


def trained(one: Setting, rows: Cached, longest: float) -> dict[str, Entry]:
    """The three dictionaries, over one stream."""
    d = one.base.config.hidden_size
    settings = Settings(lr=1e-3, warmup=0.05, shape="linear", final=0.05, dead_after=len(rows) // 2)
    entries = {
        "base": Entry("base", Dictionary(d, one.latents, BatchTopK(k=one.k)), settings),
        "pair": Entry("pair", Dictionary(2 * d, one.latents, BatchTopK(k=one.k), models=2), settings),
        "difference": Entry("difference", Dictionary(d, one.latents // 2, BatchTopK(k=one.k / 2)), settings),
    }
    fit(entries, read_as(one.site, rows.batches(one.batch, seed=0), longest), steps=one.steps)
    return entries


@torch.no_grad()
def components(rows: Tensor, k: int) -> Dictionary:
    """The projection on the first k principal components, as a dictionary of both signs of each."""
    axes = torch.linalg.eigh(rows.double().T.cov()).eigenvectors.T.flip(0)[:k].float()
    made = Dictionary(rows.shape[1], 2 * k, Standard())
    made.encoder.copy_(torch.cat([axes, -axes]))
    made.decoder.copy_(made.encoder)
    made.b_dec.copy_(rows.mean(0))
    return made


@torch.no_grad()
def directions(rows: Tensor, latents: int, k: int) -> Dictionary:
    """Random directions, the k largest, by the factor that fits the rows best."""
    made = Dictionary(rows.shape[1], latents, TopK(k=k), norm=1.0)
    made.b_dec.copy_(rows.mean(0))
    wanted, output = rows - made.b_dec, made(rows) - made.b_dec
    made.decoder.mul_((wanted * output).sum() / output.square().sum())
    return made


def losses(one: Setting, dictionaries: Mapping[str, Dictionary]) -> dict[str, dict[str, dict[str, Any]]]:
    """By dictionary and ablation."""
    texts = [ids for each in one.held_out.values() for ids in each[: one.spliced]]
    stream = one.stream([one.base], texts)
    found = losses_recovered(stream, dictionaries)
    return {name: {how: loss.to_dict() for how, (loss,) in each.items()} for name, each in found.items()}


# ---- what a fine-tuning changed


def differing(found: Changed) -> tuple[np.ndarray, np.ndarray]:
    """(latents,) the mean difference of firing rates over texts, and whether it is away from 0."""
    from scipy.stats import t

    apart = (found.active[1] - found.active[0]) / found.tokens[:, None]
    n = len(apart)
    error = apart.std(0, ddof=1) / n**0.5
    bound = t.ppf(1 - ALPHA / 2 / apart.shape[1], n - 1)
    return apart.mean(0), np.abs(apart.mean(0)) > bound * np.maximum(error, 1e-12)


def change(found: Changed) -> np.ndarray:
    """(texts,) how much each changed."""
    apart = np.abs(found.active[1] - found.active[0]).sum(1)
    return apart / np.maximum(found.active.sum((0, 2)), 1)


def welch(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean of a less mean of b, with its 95 % interval."""
    from scipy.stats import ttest_ind

    low, high = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return {"mean": float(a.mean() - b.mean()), "low": float(low), "high": float(high)}


def features(one: Setting, dictionary: Dictionary, most: int = 8) -> dict[str, Any]:
    """How much each kind of text changed, how many latents, and the ones that changed most, with what they fire on."""
    seen = {kind: changed(dictionary, one.base, one.tuned, ids, one.site, one.tokenizer, keep=one.keep)
            for kind, ids in one.held_out.items()}  # fmt: skip
    tested = {kind: differing(found) for kind, found in seen.items()}
    first, second = seen
    mean, sure = tested[first]
    order = [int(j) for j in np.argsort(-np.abs(mean) * sure) if sure[j]][:most]
    rows, shown = [], {}
    if order:
        reader = Reader(dictionary, one.tuned, one.site, one.tokenizer, keep=one.keep)
        texts = [ids for each in one.held_out.values() for ids in each]
        best = examples(reader, texts, order, k=4, before=5, after=0).to_dataframe()
        shown = {j: best[best["latent"] == j]["context"].tolist() for j in order}
    for j in order:
        rates = {kind: (found.active[:, :, j].sum(1) / found.tokens.sum()).tolist() for kind, found in seen.items()}
        low, high = (float(v) for v in np.ravel(seen[first].difference([j]).interval()))
        rows.append({"latent": j, "rates": rates, "low": low, "high": high, "on": shown[j]})
    amount = {kind: change(found) for kind, found in seen.items()}
    fates = {kind: {f: found.fates.count(f) for f in dict.fromkeys(found.fates)} for kind, found in seen.items()}
    overlap = {kind: float(found.both.sum() / (found.active.sum() - found.both.sum())) for kind, found in seen.items()}
    rates = (seen[first].active.sum(1) / seen[first].tokens.sum()).tolist()
    return {
        "amount": {kind: float(a.mean()) for kind, a in amount.items()}, "overlap": overlap, "fates": fates,
        "more": welch(amount[first], amount[second]),
        "changed": {kind: {"more": int((sure & (mean > 0)).sum()), "less": int((sure & (mean < 0)).sum())}
                    for kind, (mean, sure) in tested.items()},
        "in both": int((tested[first][1] & tested[second][1]).sum()),
        "most": rows, "rates": rates, "sure": np.flatnonzero(sure).tolist(),
    }  # fmt: skip


def own(one: Setting, crosscoder: Dictionary, rows: Tensor) -> dict[str, Any]:
    """Latents by relative norm, and what is left of those that look tuned only."""
    scaling = latent_scaling(crosscoder, rows.split(4096))
    used = scaling.rows >= ROWS
    kinds = np.array(scaling.to_dataframe()["kind"])
    looks = used & (scaling.norm > EDGE)
    shrunk, decoupled = scaling.error.abs() > PASSES, scaling.reconstruction.abs() > PASSES
    norms = scaling.norm[used]
    return {
        "used": int(used.sum()), "kinds": {kind: int((used.numpy() & (kinds == kind)).sum()) for kind in KINDS},
        "norms": norms.tolist(), "quantiles": torch.quantile(norms, torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0])).tolist(),
        "cosine": float(scaling.cosine[used].nanmedian()), "looks": int(looks.sum()),
        "shrinkage": int((looks & shrunk).sum()), "decoupling": int((looks & decoupled).sum()),
        "passes": int((looks & ~shrunk & ~decoupled).sum()),
        "nu": torch.stack([scaling.error, scaling.reconstruction], 1)[looks].tolist(),
    }  # fmt: skip


# ---- all of it


def run(one: Setting, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that the tables tell."""
    with activations(one, folder) as cache:
        say(f"{len(cache):,} rows")
        sample = cache.rows(torch.randperm(len(cache), generator=torch.Generator().manual_seed(1))[:20_000])[one.site]
        lengths = sample.chunk(2, dim=1)[0].norm(dim=1)
        longest = SINK * float(lengths.median())
        entries = trained(one, cache, longest)
        say("dictionaries trained")
    base, tuned = sample[lengths <= longest].chunk(2, dim=1)
    ours = {"dictionary": entries["base"].dictionary, CONTROLS[0]: components(base.contiguous(), one.k),
            CONTROLS[1]: directions(base.contiguous(), one.latents, one.k)}  # fmt: skip
    read = {kind: one.read(ids, longest) for kind, ids in one.held_out.items()}
    left_out = {kind: len(ids) - len(read[kind]) for kind, ids in one.held_out.items()}
    held = {kind: torch.cat([rows for _, rows in each]) for kind, each in read.items()}
    one = replace(one, held_out={kind: [ids for ids, _ in each] for kind, each in read.items()})
    say(f"held-out texts read, without {left_out}")

    def of(dictionary: Dictionary, take: Callable[[Tensor], Tensor]) -> dict[str, Quality]:
        return {kind: measure(dictionary, (take(x).contiguous() for x in rows.split(2048)))
                for kind, rows in {**held, "both": torch.cat(list(held.values()))}.items()}  # fmt: skip

    half = base.shape[1]
    takes: dict[str, Callable[[Tensor], Tensor]] = {
        "base": lambda x: x[:, :half], "tuned": lambda x: x[:, half:], "pair": lambda x: x,
        "difference": lambda x: x[:, half:] - x[:, :half],
    }  # fmt: skip
    quality = {name: of(dictionary, takes["base"]) for name, dictionary in ours.items()}
    quality["dictionary, tuned model"] = of(ours["dictionary"], takes["tuned"])
    quality["crosscoder"] = of(entries["pair"].dictionary, takes["pair"])
    quality["differences"] = of(entries["difference"].dictionary, takes["difference"])
    quality["differences' components"] = of(components((tuned - base).contiguous(), one.k // 2), takes["difference"])
    moved = {kind: float((takes["difference"](x).norm(dim=1) / takes["base"](x).norm(dim=1)).mean())
             for kind, x in held.items()}  # fmt: skip
    spliced = losses(one, ours)
    say("losses measured")
    found = features(one, ours["dictionary"])
    say("changes found")
    return {
        "rows": len(cache), "sinks": float((lengths > longest).double().mean()), "left out": left_out,
        "held out": {kind: len(x) for kind, x in held.items()},
        "quality": {name: {kind: q.to_dict() for kind, q in each.items()} for name, each in quality.items()},
        "density": quality["dictionary"]["both"].density.tolist(), "loss": spliced, "moved": moved,
        "features": found, "crosscoder": own(one, entries["pair"].dictionary, torch.cat(list(held.values()))),
        "log": {name: {what: e.log[-1][what] for what in ("fvu", "l0", "dead")} for name, e in entries.items()},
    }  # fmt: skip


def summarised(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables tell, and the verdicts of the docstring."""
    density = np.array(found["density"])
    quality, loss = found["quality"], found["loss"]
    kinds = [kind for kind in quality["dictionary"] if kind != "both"]
    rebuilt = all(quality["dictionary"][kind]["fvu"] < quality[c][kind]["fvu"] for c in CONTROLS for kind in kinds)
    nearer = all(loss["dictionary"]["zero"]["ce_dictionary"] < loss[c]["zero"]["ce_dictionary"] for c in CONTROLS)
    more = found["features"]["more"]
    verdicts = {
        "the dictionary beats its controls": ("did not hold", "in part", "held")[rebuilt + nearer],
        "the features of the text it was tuned on changed more": "held" if more["low"] > 0 else
        "the other way round" if more["high"] < 0 else "no clear difference",
        "fine-tuning made features of its own": "held" if found["crosscoder"]["passes"] else "did not hold",
    }  # fmt: skip
    used = density[density > 0]
    return {
        "rows": found["rows"], "sinks": found["sinks"], "left out": found["left out"],
        "held out": found["held out"], "quality": quality, "loss": loss,
        "density": {"median": float(np.median(used)), "dense": float((density > 0.1).mean()),
                    "rare": float((density < 1e-3).mean())},
        "moved": found["moved"], "features": {k: v for k, v in found["features"].items() if k not in ("rates", "sure")},
        "crosscoder": {k: v for k, v in found["crosscoder"].items() if k not in ("norms", "nu")}, "verdicts": verdicts,
    }  # fmt: skip


def check(report: Mapping[str, Any]) -> None:
    """What must be so of any run."""
    summary = report["summary"]
    cross = summary["crosscoder"]
    assert sum(cross["kinds"].values()) == cross["used"] and cross["passes"] <= cross["looks"]
    for each in summary["quality"].values():
        assert all(q["fvu"] >= 0 and 0 <= q["dead"] <= 1 for q in each.values())
    zero, mean = summary["loss"]["dictionary"]["zero"], summary["loss"]["dictionary"]["mean"]
    assert zero["ce"] == mean["ce"] and zero["ce_recovered"] <= 1.01 and zero["tokens"] > 0
    assert len(summary["verdicts"]) == 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--activations", type=Path, help="folder where they are kept, and found again")
    parser.add_argument("--fast", action="store_true", help="tiny-base: shows that it runs")
    options, began = parser.parse_args(), time.perf_counter()
    one_thread()
    try:
        one = tiny() if options.fast else real()
    except SurgeryError as error:
        print(f"Nothing was run: {error}")
        return
    found = run(one, options.activations, lambda told: print(f"{told}: {time.process_time():.0f} CPU s", flush=True))
    summary = rounded(summarised(found))
    slim = {k: v for k, v in rounded(found, 5).items() if k not in ("quality", "loss")}
    report = {"summary": summary, "cpu_seconds": time.process_time(), **slim}
    path = write(options.out, "smollm2_dictionary", report, picture(found), began)
    print(markdown(summary))
    print(path)


if __name__ == "__main__":
    main()
