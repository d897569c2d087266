"""What travels with the weights: config, tokenizer, chat template, licence, a model card and where it all came from.

`surgery.json` is the record for machines (provenance.py), `README.md` the card for people; both say the same facts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import dtype_code, torch_name
from surgery.checkpoint.provenance import RECORD, Provenance, fingerprint, plain, tensor_checksum
from surgery.checkpoint.reader import Source, _inside, read_json
from surgery.checkpoint.writer import CheckpointWriter
from surgery.errors import SurgeryError

__all__ = ["Provenance", "fingerprint", "model_card", "output_config", "tensor_checksum", "write_companions"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json",
)  # fmt: skip
OTHER_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
"""Only these travel. Code (`.py`) never does: it would run on the machine of whoever loads the result."""


# The model card


def model_card(provenance: Provenance, name: str, base: Source | None = None) -> str:
    """`README.md` for the hub: front matter, recipe, inputs, what happened to the tensors, how to load it.

    `name` is the title; the licence and language of `base`'s own card are carried over when it has one.
    """
    import yaml

    names = [i["name"] for i in provenance.inputs if i.get("role") in ("base", "tuned", "adapter")]
    front: dict[str, Any] = {"base_model": [_hub_name(n) for n in dict.fromkeys(names)], "library_name": "transformers"}
    front["tags"] = ["merge", "model-surgery"] if provenance.operation == "merge" else ["model-surgery"]
    front |= _inherited(base)
    recipe = provenance.recipe or {"operation": provenance.operation, **provenance.parameters}
    if not isinstance(recipe, str):
        recipe = yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe)), default=0))
    made = ", ".join(f"{k} {v}" for k, v in provenance.versions.items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"Made by model-surgery: `{provenance.operation}`, {provenance.created} ({made}). The whole record, with the "
        f"checksums of the inputs and a report for every tensor, is in [{RECORD}]({RECORD}).",
        f"## Recipe\n\n{fence}yaml\n{recipe.rstrip()}\n{fence}",
    ]
    if provenance.inputs:
        columns = ("role", "name", "parameters", "header")
        parts.append("## Inputs\n\n" + _table(columns, ([i.get(c, "") for c in columns] for i in provenance.inputs)))
    if provenance.totals:
        parts.append("## Totals\n\n" + _table(("", ""), provenance.totals.items()))
    if provenance.tensors:
        parts.append("## Tensors\n\n" + _summary(provenance.tensors))
    parts.append(
        "## Loading\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )
    return "\n\n".join(parts) + "\n"


def _hub_name(name: str) -> str:
    """Hub names stay; of a path only its last part, the hub takes no paths."""
    is_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not Path(name).exists()
    return name if is_hub else Path(name.rstrip("/")).name


def _inherited(base: Source | None) -> dict[str, str]:
    """Licence and language from the front matter of the base's card."""
    import yaml

    card = companion_folder(base) / "README.md" if base is not None else None
    if card is None or not card.is_file() or card.stat().st_size > 1_000_000:
        return {}
    match = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    wanted = ("license", "license_name", "license_link", "language")
    return {k: front[k] for k in wanted if isinstance(front.get(k), str)} if isinstance(front, dict) else {}


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(re.sub(r"\s+", " ", _short(c)).replace("|", "\\|") for c in cells) + " |"

    columns = list(columns)
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text[:16] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _summary(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each kind of tensor (layer numbers as `*`): how many, and the mean of every number reported."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, report in reports.items():
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(report)

    def numbers(report: Mapping[str, Any]) -> list[str]:
        return [k for k, v in report.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]

    keys = list(dict.fromkeys(k for report in reports.values() for k in numbers(report)))

    def mean(group: list[Mapping[str, Any]], key: str) -> float | str:
        found = [float(report[key]) for report in group if key in numbers(report)]
        return sum(found) / len(found) if found else ""

    return _table(
        ("tensor", "count", *(f"{k} (mean)" for k in keys)),
        ([name, len(group), *(mean(group, k) for k in keys)] for name, group in groups.items()),
    )


# The files


def companion_folder(source: Source) -> Path:
    """Where config and tokenizer of `source` lie: its own folder, or that of the base an adapter is on."""
    return companion_folder(source.base) if hasattr(source, "base") else source.path


def output_config(
    config: Mapping[str, Any], dtype: str | None, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`config` with `dtype` (as transformers 5 spells it, nested parts too), without `torch_dtype` and old paths.

    `changes` are set last, and reach into nested parts by dots: `{"text_config.vocab_size": 5}`.
    """

    def cleaned(part: Mapping[str, Any], outermost: bool) -> dict[str, Any]:
        kept = {k: v for k, v in part.items() if k not in ("torch_dtype", "_name_or_path")}
        if dtype is not None and (outermost or "dtype" in part or "torch_dtype" in part):
            kept["dtype"] = torch_name(dtype_code(dtype))
        return {k: cleaned(v, False) if k.endswith("_config") and isinstance(v, dict) else v for k, v in kept.items()}

    result = cleaned(config, True)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        part = result
        for step in path:
            part = part.setdefault(step, {})
        part[last] = value
    return result


def write_companions(
    writer: CheckpointWriter,
    base: Source,
    *,
    out_dtype: str | None = None,
    config_changes: Mapping[str, Any] | None = None,
    tokenizer_from: Path | None = None,
    chat_template: str | None = None,
    card: str | None = None,
    provenance: Provenance | dict[str, Any] | None = None,
) -> list[str]:
    """Puts everything but the weights into `writer`'s folder; returns the names of the files.

    Config, generation config, processors and licence come from `base`, the tokenizer from `tokenizer_from` (a folder,
    default: `base`). `out_dtype` defaults to the type that most of the written numbers have; `chat_template` (Jinja
    text) replaces the tokenizer's own. Raises `SurgeryError` for a file that is a link out of its folder.
    """
    folder, written = companion_folder(base), []

    def put(name: str, content: str | Path) -> None:
        writer.add_file(name, content)
        written.append(name)

    if base.config:
        config = output_config(base.config, out_dtype or _main_dtype(writer), config_changes)
        put("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for name in _matching(folder, OTHER_FILES):
        put(name, _inside(folder, name))
    source = Path(tokenizer_from) if tokenizer_from is not None else folder
    if tokenizer_from is not None and not _matching(source, TOKENIZER_FILES):
        raise SurgeryError(
            f"{source} holds no tokenizer.", hint="Give a folder with tokenizer.json or tokenizer.model."
        )
    for name in _matching(source, TOKENIZER_FILES):
        if chat_template is not None and (name.endswith(".jinja") or name == "chat_template.json"):
            continue
        path = _inside(source, name)
        settings = read_json(path) if name == "tokenizer_config.json" else {}
        dropped = {"name_or_path", "_name_or_path"} | ({"chat_template"} if chat_template is not None else set())
        if dropped & settings.keys():
            kept = {k: v for k, v in settings.items() if k not in dropped}
            put(name, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        else:
            put(name, path)
    if chat_template is not None:
        put("chat_template.jinja", chat_template)
    if card is not None:
        put("README.md", card)
    if provenance is not None:
        record = provenance if isinstance(provenance, Provenance) else Provenance(**provenance)
        put(RECORD, record.to_json())
    return written


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    if not folder.is_dir():
        return []
    found = {p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern) if not p.is_dir()}
    return sorted(name for name in found if not name.endswith(".py"))


def _main_dtype(writer: CheckpointWriter) -> str | None:
    """The float type that holds most of the numbers written."""
    counts: Counter[str] = Counter()
    for info in writer.tensors.values():
        counts[info.dtype] += info.numel if info.is_float else 0
    return counts.most_common(1)[0][0] if counts.total() else None
