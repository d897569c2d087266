"""Tokenizers compared by what they say: which string has which id, read from `tokenizer.json` alone.

Rows of an embedding mean tokens. Two models can be merged row by row only where the same row is the same string, so
vocabularies are compared (`difference`) and brought into one order (`token_alignment.align`) by string, never by
position. Nothing here imports transformers or torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.checkpoint.reader import read_json
from surgery.errors import SurgeryError

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MAX_ID = 10_000_000
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer's tokens and ids, and what decides how it splits text."""

    folder: Path
    tokens: dict[str, int]
    """Every token string, added ones included, and its id."""
    added: dict[str, dict[str, Any]]
    """Settings (special, lstrip, ...) of the tokens that are looked for in the text before the model splits it."""
    roles: dict[str, str]
    """bos_token, eos_token, ... and their strings."""
    kind: str
    """BPE, WordPiece, WordLevel or Unigram."""
    raw: dict[str, Any] = field(repr=False)
    """`tokenizer.json` as it was read."""

    @classmethod
    def open(cls, folder: str | Path) -> Vocabulary:
        """The vocabulary of a model's folder. Raises `SurgeryError` when there is no usable `tokenizer.json`."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise SurgeryError(
                f"{folder} has no tokenizer.json.",
                hint="Save the tokenizer in the fast format: AutoTokenizer.from_pretrained(x).save_pretrained(folder).",
            )
        raw = read_json(path)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        model = raw.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise SurgeryError(f"{path} holds no vocabulary.", hint="Is it written by the `tokenizers` library?")
        tokens = _model_tokens(model["vocab"], path)
        added = _added_tokens(raw, config, path)
        tokens |= {content: settings["id"] for content, settings in added.items()}
        bad = next((t for t, i in tokens.items() if type(i) is not int or not 0 <= i < _MAX_ID), None)
        if bad is not None:
            raise SurgeryError(f"{path} gives the token {bad!r} the id {tokens[bad]!r}, which is none.")
        kind = str(model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE"))
        return cls(folder, tokens, added, _roles(folder, config), kind, raw)

    @property
    def size(self) -> int:
        """One more than the largest id: the fewest rows an embedding must have."""
        return max(self.tokens.values(), default=-1) + 1

    @property
    def special(self) -> frozenset[str]:
        """Tokens that stand for no text: those marked special and those with a role."""
        marked = {t for t, settings in self.added.items() if settings.get("special")}
        return frozenset(marked | (set(self.roles.values()) & self.tokens.keys()))

    @cached_property
    def by_id(self) -> dict[int, str]:
        """The token of each id."""
        return {i: t for t, i in sorted(self.tokens.items(), key=lambda item: item[0] in self.added)}

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merge rules of BPE, in order of priority; none for other kinds."""
        rules = self.raw["model"].get("merges") or []
        pairs = [tuple(r.split(" ", 1)) if isinstance(r, str) else tuple(r) for r in rules]
        if any(len(p) != 2 for p in pairs):
            raise SurgeryError(f"{self.folder / 'tokenizer.json'} has merges that are not pairs.")
        return pairs  # type: ignore[return-value]

    @cached_property
    def splitting(self) -> str:
        """Hash of what decides how text is split, the tokens and merges aside: normaliser, pre-tokenizer, flags."""
        model = {k: v for k, v in self.raw["model"].items() if k not in ("vocab", "merges") and v not in (None, "")}
        return _hash([self.raw.get("normalizer"), self.raw.get("pre_tokenizer"), self.raw.get("decoder"), model])

    @cached_property
    def merges_hash(self) -> str:
        """Hash of the merge rules and their order."""
        return _hash([list(pair) for pair in self.merges])

    @cached_property
    def digest(self) -> str:
        """Equal digests: same ids, same splitting, same special tokens."""
        return _hash([sorted(self.tokens.items()), self.merges_hash, self.splitting, sorted(self.special), self.roles])


@dataclass(frozen=True)
class Difference:
    """What sets two vocabularies apart; `str()` says it in a few lines."""

    names: tuple[str, str]
    sizes: tuple[int, int]
    moved: dict[str, tuple[int, int]]
    """Tokens of both that have different ids."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    roles: dict[str, tuple[str | None, str | None]]
    """Roles (eos_token, ...) that are played by different tokens."""
    special: tuple[str, ...]
    """Tokens of both that are special in one only."""
    merges: bool
    """Merge rules differ."""
    splitting: bool
    """Normaliser, pre-tokenizer, decoder or model flags differ."""

    @property
    def same_rows(self) -> bool:
        """Every id means the same string in both, so that embeddings can be combined as they are."""
        return not (self.moved or self.only_a or self.only_b)

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return self.same_rows and not (self.roles or self.special or self.merges or self.splitting)

    def __str__(self) -> str:
        a, b = self.names
        if self.equal:
            return f"The tokenizers of {a} and {b} are equal ({self.sizes[0]} tokens)."
        lines = [f"The tokenizers of {a} ({self.sizes[0]} tokens) and {b} ({self.sizes[1]} tokens) differ:"]
        if self.moved:
            shown = [f"{t!r} {i} -> {j}" for t, (i, j) in list(self.moved.items())[:_SHOWN]]
            lines.append(f"  {_count(self.moved)} with another id: {_list(shown, len(self.moved))}")
        for name, only in ((a, self.only_a), (b, self.only_b)):
            if only:
                lines.append(f"  {_count(only)} only in {name}: {_list([repr(t) for t in only[:_SHOWN]], len(only))}")
        lines += [f"  {role}: {x!r} and {y!r}" for role, (x, y) in self.roles.items()]
        if self.special:
            shown = [repr(t) for t in self.special[:_SHOWN]]
            lines.append(f"  {_count(self.special)} special in one only: {_list(shown, len(self.special))}")
        if self.merges:
            lines.append("  the merge rules differ: the same text may be split differently")
        if self.splitting:
            lines.append("  the normaliser, pre-tokenizer or decoder differs: the same text may be split differently")
        return "\n".join(lines)


def difference(a: Vocabulary, b: Vocabulary) -> Difference:
    """What sets two vocabularies apart, token by token."""
    names = (str(a.folder), str(b.folder))
    common = a.tokens.keys() & b.tokens.keys()
    moved = {t: (i, b.tokens[t]) for t, i in a.tokens.items() if t in common and b.tokens[t] != i}
    roles = {
        role: (a.roles.get(role), b.roles.get(role))
        for role in [*_ROLES, *sorted((a.roles.keys() | b.roles.keys()) - set(_ROLES))]
        if a.roles.get(role) != b.roles.get(role)
    }
    return Difference(
        names=names,
        sizes=(len(a.tokens), len(b.tokens)),
        moved=moved,
        only_a=tuple(t for t in a.tokens if t not in common),
        only_b=tuple(t for t in b.tokens if t not in common),
        roles=roles,
        special=tuple(sorted((a.special ^ b.special) & common)),
        merges=a.merges_hash != b.merges_hash,
        splitting=a.splitting != b.splitting,
    )


def _model_tokens(vocab: Any, path: Path) -> dict[str, int]:
    """A vocabulary is {token: id}, or for Unigram a list of [token, score] in order of id."""
    if isinstance(vocab, dict):
        return dict(vocab)
    if isinstance(vocab, list) and all(isinstance(v, list) and v and isinstance(v[0], str) for v in vocab):
        return {entry[0]: i for i, entry in enumerate(vocab)}
    raise SurgeryError(f"{path}: the vocabulary is neither a mapping nor a list of [token, score].")


def _added_tokens(raw: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Added tokens of tokenizer.json, then those that only tokenizer_config.json knows."""
    entries = raw.get("added_tokens") or []
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, list) or not isinstance(decoder, dict):
        raise SurgeryError(f"{path}: the added tokens are not a list.")
    if not all(isinstance(e, dict) and str(i).isdecimal() for i, e in decoder.items()):
        raise SurgeryError(f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder is malformed.")
    added: dict[str, dict[str, Any]] = {}
    for entry in [*entries, *({"id": int(i), **e} for i, e in decoder.items())]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or "id" not in entry:
            raise SurgeryError(f"{path}: the added token {entry!r} has no content or no id.")
        added.setdefault(entry["content"], {k: v for k, v in entry.items() if not k.startswith("__")})
    return added


def _roles(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The strings of bos_token and the like; each is a text or {"content": text}."""
    legacy = folder / "special_tokens_map.json"
    settings = {**(read_json(legacy) if legacy.is_file() else {}), **config}
    found = {}
    for role in _ROLES:
        value = settings.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[role] = value
    return found


def _hash(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


def _count(things: Any) -> str:
    return "1 token" if len(things) == 1 else f"{len(things)} tokens"


def _list(shown: list[str], total: int) -> str:
    return ", ".join(shown) + (f" and {total - len(shown)} more" if total > len(shown) else "")
