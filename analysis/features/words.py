"""Tokens as they read, the tokens that spell a string, and the tokens that a direction of the stream promotes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from analysis.diff.lens import read, word
from surgery.errors import SurgeryError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache
def _byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: printable ones for themselves, others above."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token adds to a text. Of tokens that are half a character their own bytes, which decoding loses."""
    text = word(tokenizer, token)
    if "�" not in text:
        return text.encode()
    raw = str(tokenizer.convert_ids_to_tokens(token))
    if byte := _BYTE.fullmatch(raw):
        return bytes([int(byte[1], 16)])
    table = _byte_of()
    return bytes(table[letter] for letter in raw) if all(letter in table for letter in raw) else text.encode()


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it reads; bytes that are no whole character as \\xe2. By number without a tokenizer."""
    return token_bytes(tokenizer, token).decode(errors="backslashreplace")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens that follow each other, as they read: a character of several tokens stands whole at the first of them,
    and the others show their bytes."""
    parts = [token_bytes(tokenizer, token) for token in ids]
    whole, found, start, owed = b"".join(parts), [], 0, 0
    for part in parts:
        end, lead = start + len(part), min(owed, len(part))
        stop = end
        while lead < len(part) and stop < min(len(whole), end + 3) and whole[stop] & 0xC0 == 0x80:
            stop += 1  # the rest of a character that begins here
        if stop > end and not _is_text(whole[start + lead : stop]):
            stop = end
        both = part[:lead], whole[start + lead : stop]
        found.append("".join(piece.decode(errors="backslashreplace") for piece in both))
        start, owed = end, owed - lead + stop - end
    return found


def _is_text(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


def spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as one text: characters of several tokens are whole again."""
    return b"".join(token_bytes(tokenizer, token) for token in ids).decode(errors="backslashreplace")


def spelling(tokenizer: Any, ids: Sequence[int], string: str) -> list[bool]:
    """Of each token of a text whether it has a part in an occurrence of `string`, however that is cut into tokens."""
    if tokenizer is None:
        raise SurgeryError("Strings are looked for with a tokenizer: pass tokenizer= to the Reader.")
    if not string:
        raise SurgeryError("An empty string is everywhere.", hint="Name the text of a tag, as in '<think>'.")
    parts = [token_bytes(tokenizer, token) for token in ids]
    whole, wanted = b"".join(parts), string.encode()
    inside = bytearray(len(whole))
    at = whole.find(wanted)
    while at >= 0:
        inside[at : at + len(wanted)] = b"\1" * len(wanted)
        at = whole.find(wanted, at + 1)
    found, start = [], 0
    for part in parts:
        found.append(any(inside[start : start + len(part)]))
        start += len(part)
    return found


def promoted(model: Any, directions: Tensor, k: int = 8, tokenizer: Any = None
             ) -> list[tuple[list[tuple[str, float]], list[tuple[str, float]]]]:  # fmt: skip
    """Of each direction (n, d_model) the k tokens whose logits it raises most, and lowers most, with the changes.

    Read through the model's last norm, as the logit lens does: of the unit direction, less what an empty stream gives.
    Raises `SurgeryError` for directions of another width, as of heads and neurons.
    """
    width = model.config.get_text_config().hidden_size
    if directions.shape[-1] != width:
        raise SurgeryError(f"Only directions of the stream promote tokens: it is {width} wide, "
                           f"and these {directions.shape[-1]}.")  # fmt: skip
    change = read(model, directions) - read(model, torch.zeros_like(directions[:1]))
    k = min(k, change.shape[-1])
    found = []
    for row in change.cpu():
        sides = [(row.topk(k), 1), ((-row).topk(k), -1)]
        up, down = (
            [(token_text(tokenizer, int(i)), sign * float(v)) for v, i in zip(*best, strict=True)]
            for best, sign in sides
        )
        found.append((up, down))
    return found
