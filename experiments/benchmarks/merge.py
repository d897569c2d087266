"""Merging against mergekit 0.1.5 and against the floor of moving the bytes, in one run.

    python experiments/benchmarks/merge.py                      # 0.5 B parameters, every method, 3 rounds
    python experiments/benchmarks/merge.py --scale 1.5 --no-peer  # memory at three times the size

Makes a family (a base and two fine-tunings, random weights, bf16, sharded, 24 Llama blocks) on a RAM disk, then runs
whole commands in turn: ours, `mergekit-yaml` on the same YAML, and a bare script that reads the models, averages and
writes. Reports seconds (median over rounds), ratios, and peak anonymous memory; writes `results/merge.json` and the
table in `README.md`'s form to the terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import surgery
from surgery.checkpoint import CheckpointWriter, TensorInfo

HERE = Path(__file__).parent
WEIGHTS = {"linear": 0.5, "task_arithmetic": 0.5, "breadcrumbs": 0.3, "breadcrumbs_ties": 0.3}
MORE: dict[str, dict[str, float]] = {
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.14, "gamma": 0.01},
    "breadcrumbs_ties": {"density": 0.14, "gamma": 0.01},
}
METHODS = ("linear", "task_arithmetic", "slerp", "model_stock", "dare_ties", "breadcrumbs", "ties", "breadcrumbs_ties")

FLOOR = """
import sys, os, json, struct, time
began = time.perf_counter()
import torch
from concurrent.futures import ThreadPoolExecutor
from safetensors import safe_open
imported = time.perf_counter()
torch.set_num_threads(1)
folders, out = sys.argv[1:-1], sys.argv[-1]
os.makedirs(out)
index = json.load(open(folders[0] + "/model.safetensors.index.json"))["weight_map"]
files = [{f: safe_open(d + "/" + f, "pt") for f in sorted(set(index.values()))} for d in folders]
header, place = {}, 0
for name in index:
    shape = files[0][index[name]].get_slice(name).get_shape()
    size = 2
    for s in shape: size *= s
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
    place += size
text = json.dumps(header).encode(); text += b" " * (-len(text) % 8)
fd = os.open(out + "/model.safetensors", os.O_CREAT | os.O_RDWR)
os.pwrite(fd, struct.pack("<Q", len(text)) + text, 0)
def average(name):
    with torch.inference_mode():
        flat = [f[index[name]].get_tensor(name).view(-1) for f in files]
        start = 8 + len(text) + header[name]["data_offsets"][0]
        for i in range(0, flat[0].numel(), 1 << 18):
            mean = flat[0][i:i + (1 << 18)].float()
            for x in flat[1:]: mean += x[i:i + (1 << 18)]
            mean /= len(flat)
            os.pwrite(fd, mean.bfloat16().view(torch.uint8).numpy().data, start + 2 * i)
names = sorted(index, key=lambda n: header[n]["data_offsets"][0] - header[n]["data_offsets"][1])
with ThreadPoolExecutor(int(os.environ.get("FLOOR_THREADS", "2"))) as pool: list(pool.map(average, names))
print(json.dumps({"import": imported - began, "work": time.perf_counter() - imported}))
"""


def make_family(folder: Path, scale: float) -> None:
    """base, ft0 and ft1: 24 Llama blocks, bf16, shards of 300 MB, updates of sd 1e-3 on weights of sd 0.02."""
    width = int(1280 * scale**0.5) // 64 * 64
    inner, vocab, kv = width * 27 // 10 // 64 * 64, 32_000, 256
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width), "model.norm.weight": (width,)
    }  # fmt: skip
    for i in range(24):
        p = f"model.layers.{i}."
        shapes |= {f"{p}input_layernorm.weight": (width,), f"{p}post_attention_layernorm.weight": (width,)}
        for n, s in {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}.items():
            shapes[f"{p}self_attn.{n}_proj.weight"] = s
        for n, s in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            shapes[f"{p}mlp.{n}_proj.weight"] = s
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": 24, "num_attention_heads": width // 64, "num_key_value_heads": kv // 64, "head_dim": 64,
        "vocab_size": vocab, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "dtype": "bfloat16",
    }  # fmt: skip
    infos = [TensorInfo(n, "BF16", s) for n, s in shapes.items()]
    writers = [CheckpointWriter(folder / m, infos, shard_size="300MB") for m in ("base", "ft0", "ft1")]
    generator = torch.Generator().manual_seed(0)
    with writers[0] as base, writers[1] as ft0, writers[2] as ft1:
        for name, shape in shapes.items():
            weights = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            base.write(name, weights)
            for writer in (ft0, ft1):
                writer.write(name, (weights + torch.randn(shape, generator=generator).mul_(1e-3)).bfloat16())
        for writer in writers:
            writer.add_file("config.json", json.dumps(config))


def recipe(method: str, folder: Path) -> str:
    """The same YAML for both tools, in mergekit's dialect."""
    models = ["base", "ft0"] if method == "slerp" else ["ft0", "ft1"]
    parameters = (
        {} if method in ("slerp", "model_stock") else {"weight": WEIGHTS.get(method, 0.5), **MORE.get(method, {})}
    )
    document: dict[str, Any] = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
    document["models"] = [
        {"model": str(folder / m), **({"parameters": parameters} if parameters else {})} for m in models
    ]
    if method != "linear":
        document["base_model"] = str(folder / "base")
    if method == "slerp":
        document["parameters"] = {"t": 0.5}
    return yaml.safe_dump(document)


def run(command: list[str], out: Path) -> dict[str, float]:
    """Seconds and peak anonymous MB of one command; its output folder is removed afterwards."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=said, stderr=log, env=environment)
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, *(int(l.split()[1]) for l in status.splitlines() if l.startswith("RssAnon")), 0)
            except (OSError, ValueError):
                pass
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        said.seek(0)
        log.seek(0)
        text, errors = said.read().decode(errors="replace"), log.read().decode(errors="replace")
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-1000:]}{errors[-3000:]}")
    shutil.rmtree(out)
    found = {"seconds": seconds, "anonymous_mb": peak / 1024}
    if text.lstrip().startswith("{"):  # both we and the floor say how long the work itself took
        report = json.loads(text)
        found["work"] = report["work"] if "work" in report else report["seconds"]
    return found


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="size of the family: 1 is 0.5 B, 3 is 1.5 B parameters"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit out")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "merge.json")
    args = parser.parse_args()
    mergekit = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or shutil.which("mergekit-yaml")
    if mergekit is None and not args.no_peer:
        sys.exit("mergekit-yaml is not installed: pip install 'model-surgery[peers]', or pass --no-peer.")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="merge-benchmark-") as name:
        folder = Path(name)
        make_family(folder, args.scale)
        size = sum(f.stat().st_size for f in (folder / "base").glob("*.safetensors"))
        print(f"family of {size / 2e9:.3f} B parameters in {folder}; {args.threads} threads", flush=True)
        (folder / "floor.py").write_text(FLOOR)
        out, rows = folder / "out", []
        for method in args.methods:
            (folder / "recipe.yaml").write_text(recipe(method, folder))
            models = [str(folder / m) for m in (["base", "ft0"] if method == "slerp" else ["ft0", "ft1"])]
            yaml_and_out = [str(folder / "recipe.yaml"), str(out)]
            ours = [str(Path(sys.executable).parent / "surgery"), "merge", yaml_and_out[0], "-o", str(out), "--json"]
            commands = {
                "ours": [*ours, "--threads", str(args.threads)],
                "floor": [sys.executable, str(folder / "floor.py"), *models, str(out)],
                "mergekit": [str(mergekit), "--no-copy-tokenizer", "--quiet", *yaml_and_out],
            }
            if args.no_peer:
                del commands["mergekit"]
            found: dict[str, list[dict[str, float]]] = {who: [] for who in commands}
            for _ in range(args.rounds):  # in turn, so that a slow minute of the machine hits all of them
                for who, command in commands.items():
                    found[who].append(run(command, out))
            rows.append(row(method, found))
            print(line(rows[-1]), flush=True)
        report = {
            "parameters": size // 2, "threads": args.threads, "rounds": args.rounds, "rows": rows,
            "surgery": surgery.__version__, "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + table(rows))


def row(method: str, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, and ratios of them."""

    def median(who: str, what: str) -> float | None:
        values = [r[what] for r in found.get(who, []) if what in r]
        return statistics.median(values) if values else None

    result: dict[str, Any] = {"method": method}
    for who in found:
        result[who] = {what: median(who, what) for what in ("seconds", "work", "anonymous_mb")}
        result[who]["all_seconds"] = [r["seconds"] for r in found[who]]
    if "mergekit" in found:
        result["times_faster"] = result["mergekit"]["seconds"] / result["ours"]["seconds"]
    if result["ours"]["work"] and result["floor"]["work"]:
        result["work_over_floor"] = result["ours"]["work"] / result["floor"]["work"]
    return result


def line(r: dict[str, Any]) -> str:
    """One row of the Markdown table."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    peer = r.get("mergekit", {})
    cells = [
        r["method"], number(r["ours"]["seconds"], ".2f"), number(peer.get("seconds"), ".2f"),
        number(r.get("times_faster"), ".1f"), number(r["ours"]["work"], ".2f"), number(r["floor"]["work"], ".2f"),
        number(r.get("work_over_floor"), ".2f"), number(r["ours"]["anonymous_mb"], ".0f"),
        number(peer.get("anonymous_mb"), ".0f"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    """The table of `README.md`."""
    head = (
        "| method | ours, s | mergekit, s | times faster | our work, s | floor's work, s | work / floor "
        "| ours, MB | mergekit, MB |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *map(line, rows)])


if __name__ == "__main__":
    main()
