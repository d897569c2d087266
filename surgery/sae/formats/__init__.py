"""Dictionaries in files: our own, and those of other packages, in and out.

    dictionary, metadata = load("folder")                      # whichever format it is of
    save(dictionary, "folder", metadata={"site": "resid_post.6"})      # format="saelens", ...

| format | what it holds | file |
|---|---|---|
| surgery | every dictionary, bit for bit, with its settings for training | own.py |
| saelens | standard, gated, topk, jumprelu, transcoders; batchtopk and matryoshka as jumprelu | saelens.py |
| sparsify | topk: autoencoders, transcoders of one width, skips | sparsify.py |
| dictionary_learning | all autoencoders (pickles), crosscoders | dictionary_learning.py |

What the others keep is what a dictionary computes after training: its settings for training (penalties, rates) are not.
Numbers are kept bit for bit, but for what a format has no place for and is put into others: the files say which, and
parts.py how. 16-bit numbers become float32, which is exact. Codes and reconstructions of the packages themselves are
the same to float rounding: sums are taken in another order. Of two pre-activations that are equal to rounding either
can be chosen, once norms are folded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary
from surgery.sae.formats import dictionary_learning, own, saelens, sparsify  # noqa: F401 (they register themselves)
from surgery.sae.formats.files import FORMATS, Format, write_folder
from surgery.sae.formats.parts import Parts

__all__ = ["FORMATS", "load", "save"]


def load(path: str | Path, format: str | None = None, *, allow_pickle: bool = False
         ) -> tuple[Dictionary, dict[str, Any]]:  # fmt: skip
    """The dictionary in a folder, and what its config says beside it (its place in the model, how it was trained).

    `format` is found out where it is not given. `allow_pickle` admits dictionary_learning's `ae.pt`, read as plain
    tensors (`weights_only=True`). Raises `SurgeryError` for what is of none of the formats, damaged, of a newer
    format, or does something that no dictionary here does.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        hint = "Give the folder of the file." if folder.exists() else None
        raise SurgeryError(f"{folder} is no folder with a dictionary.", hint=hint)
    kind = _found(folder) if format is None else FORMATS.lookup(format)()
    parts, metadata = kind.read(folder, allow_pickle=allow_pickle)
    return parts.dictionary(folder), metadata


def save(
    dictionary: Dictionary,
    path: str | Path,
    format: str = "surgery",
    *,
    metadata: dict[str, Any] | None = None,
    force: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Writes a dictionary as a folder of `format`, and `metadata` (JSON) into its config. The dictionary is untouched.

    Under the name there is never half a folder, and one that exists is replaced by `force` alone. `allow_pickle`
    admits dictionary_learning's `ae.pt`. Raises `SurgeryError` for what the format can't hold.
    """
    out = Path(path).expanduser()
    files = FORMATS.lookup(format)().write(Parts.of(dictionary), dict(metadata or {}), allow_pickle=allow_pickle)
    write_folder(out, files, force=force)
    return out


def _found(folder: Path) -> Format:
    kinds = {name: kind() for name, kind in FORMATS.items()}
    found = {name: kind for name, kind in kinds.items() if kind.finds(folder)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise SurgeryError(f"{folder} holds files of {' and '.join(found)}.", hint="Name the format.")
    inside = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and any(k.finds(sub) for k in kinds.values()))
    named = "It has some in " + ", ".join(inside[:5]) + ": give one of them."
    wanted = "One of " + ", ".join(w for kind in kinds.values() for w in kind.weights) + " is expected in it."
    raise SurgeryError(f"{folder} holds no dictionary that is known here.", hint=named if inside else wanted)
