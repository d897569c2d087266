"""Write the tokenizer of an alignment: the template's files with tokens added, removed and renumbered.

An ordinary new token goes into the model's vocabulary, with the merge rules (BPE) or the score (Unigram) that its own
tokenizer has for it, behind the template's: text is split as before, up to the new tokens. Added tokens of the others
(chat markers) become added tokens with their own settings. Ordinary strings are never made added tokens, which would
be cut out of the middle of words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.checkpoint.token_alignment import Alignment
from surgery.checkpoint.vocabulary import Vocabulary
from surgery.errors import SurgeryError

# the slow formats can't hold the new tokens and would contradict tokenizer.json
_CARRIED = ("special_tokens_map.json", "chat_template.json", "chat_template.jinja")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def write_tokenizer(alignment: Alignment, folder: str | Path) -> Path:
    """Write `tokenizer.json`, `tokenizer_config.json` and what goes with them into `folder` (made if need be).

    The result is read back with the `tokenizers` library; raises `SurgeryError` when an id is not as wanted there.
    """
    folder, template = Path(folder), alignment.template
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(alignment)
    text = json.dumps(tokenizer, ensure_ascii=False, indent=2)
    _check(text, alignment)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    for name in _CARRIED:
        if (template.folder / name).is_file():
            (folder / name).write_bytes((template.folder / name).read_bytes())
    config_path = template.folder / "tokenizer_config.json"
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if tokenizer["model"].get("ignore_merges") and not template.raw["model"].get("ignore_merges"):
            # a family's own class would build its tokenizer anew from tokens and merges, without this flag
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]
            }
        out = json.dumps(config, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(out + "\n", encoding="utf-8")
    return folder


def _tokenizer(alignment: Alignment) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    ids, template = alignment.ids, alignment.template
    raw = json.loads(json.dumps(template.raw))
    donors = [template, *(v for v in alignment.vocabularies if v is not template)]
    added: list[dict[str, Any]] = []
    for token, row in ids.items():
        # a token of the template stays what it is there; a new one is what the first that has it says
        owner = next((v for v in donors if token in v.tokens), None)
        settings = {**_PLAIN, "special": True} if owner is None else owner.added.get(token)
        if settings is not None:
            added.append({**_PLAIN, **settings, "id": row, "content": token})
    raw["added_tokens"] = sorted(added, key=lambda t: t["id"])
    model = raw["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = ids
        if template.kind == "BPE":
            model["merges"] = _merges(alignment, donors)
            # a word that is a token is taken whole, also where the template's merges would have led elsewhere
            new = ids.keys() - template.tokens.keys() - {t["content"] for t in added}
            model["ignore_merges"] = bool(new or model.get("ignore_merges"))
    else:
        model["vocab"] = _scores(alignment, donors)
        unknown = template.by_id.get(model.get("unk_id") if model.get("unk_id") is not None else -1)
        model["unk_id"] = ids.get(unknown) if unknown is not None else None
    raw["post_processor"] = _renumbered(raw.get("post_processor"), ids)
    if isinstance(raw.get("padding"), dict) and raw["padding"].get("pad_token") in ids:
        raw["padding"]["pad_id"] = ids[raw["padding"]["pad_token"]]
    return raw


def _merges(alignment: Alignment, donors: list[Vocabulary]) -> list[list[str]]:
    """The template's rules whose tokens are all there, then the others' rules that make new tokens."""
    ids, known = alignment.ids, alignment.template.tokens
    prefix = alignment.template.raw["model"].get("continuing_subword_prefix") or ""
    rules: dict[tuple[str, str], None] = {}
    for vocabulary in donors:
        for left, right in vocabulary.merges if vocabulary.kind == "BPE" else ():
            made = left + right.removeprefix(prefix)
            wanted = vocabulary is alignment.template or made not in known
            if wanted and left in ids and right in ids and made in ids:
                rules.setdefault((left, right))
    return [list(pair) for pair in rules]


def _scores(alignment: Alignment, donors: list[Vocabulary]) -> list[list[Any]]:
    """Unigram's [token, score] in order of id; a token without a score gets one that no segmentation picks."""
    scores: dict[str, float] = {}
    for vocabulary in reversed(donors):
        if isinstance(vocabulary.raw["model"]["vocab"], list):
            scores |= {entry[0]: entry[1] for entry in vocabulary.raw["model"]["vocab"]}
    lowest = min(scores.values(), default=0.0) - 100.0
    last = max(alignment.ids.values(), default=-1)
    holes = [r for r in range(last + 1) if alignment.tokens[r] is None]
    if holes:
        raise SurgeryError(
            f"The tokenizer of {alignment.template.folder} has no token for row {holes[0]}, and a Unigram vocabulary "
            "can have no holes.", hint="Use the tokenizer of one of the models: vocab: base.",
        )  # fmt: skip
    return [[t, scores.get(t, lowest)] for t in alignment.tokens[: last + 1] if t is not None]


def _renumbered(part: Any, ids: dict[str, int]) -> Any:
    """A post-processor with its ids looked up again, as {"ids": [1], "tokens": ["<s>"]} or ["[SEP]", 102]."""
    if isinstance(part, dict):
        part = {k: _renumbered(v, ids) for k, v in part.items()}
        tokens = part.get("tokens")
        if isinstance(part.get("ids"), list) and isinstance(tokens, list):
            part["ids"] = [ids.get(t, i) for t, i in zip(tokens, part["ids"], strict=False)]
        return part
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int:
            return [part[0], ids.get(part[0], part[1])]
        return [_renumbered(v, ids) for v in part]
    return part


def _check(text: str, alignment: Alignment) -> None:
    """Read back by the library that will read it in earnest."""
    from tokenizers import Tokenizer

    where = f"The tokenizer made from {alignment.template.folder}"
    try:
        found = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as problem:  # the library raises bare Exception
        raise SurgeryError(f"{where} can't be read back: {problem}.", hint="Use vocab: base.") from None
    wrong = next((t for t, r in alignment.ids.items() if found.get(t) != r), None)
    if wrong is not None:
        raise SurgeryError(
            f"{where} gives the token {wrong!r} the id {found.get(wrong)}, not {alignment.ids[wrong]}.",
            hint="Use vocab: base.",
        )
