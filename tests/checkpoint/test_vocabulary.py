"""Vocabularies compared, aligned by string and written, on small tokenizers of every kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from surgery.checkpoint.token_alignment import Donor, align
from surgery.checkpoint.tokenizer_files import write_tokenizer
from surgery.checkpoint.vocabulary import Vocabulary, difference
from surgery.errors import SurgeryError

CODE = ["def add(a, b): return a + b", "for i in range(10): print(i)", "return return return range"] * 3
PROSE = ["the cat sat on the mat", "a dog and a cat sat there", "mathematics is the queen of sciences"] * 3
CHATML = ["<|im_start|>", "<|im_end|>"]


def bpe(text, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    bos = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def wordlevel(text, special):
    tokenizer = Tokenizer(models.WordLevel(unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(text, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return tokenizer


def wordpiece(text, special):
    tokenizer = Tokenizer(models.WordPiece(unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def unigram(text, special):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token=special[0], show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def save(tokenizer, folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return folder


def plain(folder, tokens, special=(), **config):
    """A WordLevel tokenizer of exactly these tokens."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return Vocabulary.open(save(tokenizer, folder, **config))


@pytest.fixture
def abc(tmp_path):
    return plain(tmp_path / "a", ["<unk>", "x", "y", "z"]), plain(tmp_path / "b", ["<unk>", "z", "x", "w"])


# --- reading and comparing ----------------------------------------------------------------------------------------


def test_reading_agrees_with_the_tokenizers_library(tmp_path):
    for build in (bpe, wordlevel, wordpiece, unigram):
        tokenizer = build(PROSE, ["<unk>"])
        tokenizer.add_tokens(["extra"])
        vocabulary = Vocabulary.open(save(tokenizer, tmp_path / build.__name__, unk_token="<unk>"))
        assert vocabulary.tokens == tokenizer.get_vocab(with_added_tokens=True)
        assert vocabulary.size == tokenizer.get_vocab_size() and "extra" in vocabulary.added
        assert vocabulary.special == {"<unk>"} and vocabulary.kind.lower() == build.__name__


def test_added_tokens_of_the_config_count(tmp_path):
    folder = save(wordlevel(PROSE, ["<unk>"]), tmp_path / "t")
    config = {"added_tokens_decoder": {"90": {"content": "<late>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = Vocabulary.open(folder)
    assert vocabulary.tokens["<late>"] == 90 and "<late>" in vocabulary.special


def test_difference(tmp_path, abc):
    a, b = abc
    found = difference(a, b)
    assert not found.equal and not found.same_rows
    assert found.moved == {"x": (1, 2), "z": (3, 1)} and found.only_a == ("y",) and found.only_b == ("w",)
    for words in ("2 tokens with another id", "'x' 1 -> 2", "1 token only in", "'w'"):
        assert words in str(found)
    same = Vocabulary.open(a.folder)
    assert difference(a, same).equal and same.digest == a.digest != b.digest
    assert "are equal" in str(difference(a, same))


def test_difference_sees_more_than_tokens(tmp_path):
    one = plain(tmp_path / "one", ["<unk>", "x"], eos_token="x")
    two = plain(tmp_path / "two", ["<unk>", "x"], eos_token="<unk>")
    found = difference(one, two)
    assert found.same_rows and not found.equal and found.roles == {"eos_token": ("x", "<unk>")}

    file = save(bpe(PROSE, ["<s>"]), tmp_path / "three") / "tokenizer.json"
    three = Vocabulary.open(file.parent)
    raw = json.loads(file.read_text())
    raw["model"]["merges"].reverse()
    file.write_text(json.dumps(raw))
    swapped = difference(three, Vocabulary.open(file.parent))
    assert swapped.merges and swapped.same_rows and not swapped.splitting and "merge rules" in str(swapped)
    raw["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(raw))
    assert difference(three, Vocabulary.open(file.parent)).splitting


@pytest.mark.parametrize(
    "raw",
    [
        "{}", "[]", "{", '{"model": {}}', '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": -1}}}',
        '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": {"a": 99999999999}}}', '{"model": {"vocab": [1]}}',
        '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', '{"model": {"vocab": {}}, "added_tokens": 3}',
        '{"model": {"vocab": {"a": true}}}',
    ],
)  # fmt: skip
def test_a_broken_tokenizer_gets_a_sentence(tmp_path, raw):
    (tmp_path / "tokenizer.json").write_text(raw)
    with pytest.raises(SurgeryError, match=r"tokenizer\.json"):
        Vocabulary.open(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(SurgeryError, match=r"no tokenizer\.json"):
        Vocabulary.open(tmp_path)


# --- aligning -----------------------------------------------------------------------------------------------------


def filled(alignment, tables):
    """What an engine makes of the plan: every model's aligned embedding, put together from two blocks."""
    out = []
    for i, table in enumerate(tables):
        result = np.full((alignment.size, table.shape[1]), np.nan)
        cut = alignment.size // 2
        for start, stop in ((0, cut), (cut, alignment.size)):
            block, plan = result[start:stop], alignment.plan(i, start, stop)
            block[plan.out] = table[plan.own]
            for k, m, r in zip(plan.lent_out, plan.lent_model, plan.lent_row, strict=True):
                block[k] = tables[m][r]
            for k, parts in plan.means:
                block[k] = np.mean([tables[m][r] for m, r in parts], axis=0)
            block[plan.zeros] = 0
            block[plan.padding] = -1
        assert not np.isnan(result).any()
        out.append(result[:, 0].tolist())
    return out


def tables(*heights):
    return [np.arange(h, dtype=float)[:, None] + 100 * (i + 1) for i, h in enumerate(heights)]


def test_base(abc):
    alignment = align(abc, "base")
    assert alignment.tokens == ("<unk>", "x", "y", "z") and alignment.same_tokenizer
    assert alignment.identity(0) and not alignment.identity(1)
    assert [r.tolist() for r in alignment.rows] == [[0, 1, 2, 3], [0, 2, -1, 1]]
    assert filled(alignment, tables(4, 4)) == [[100, 101, 102, 103], [200, 202, 102, 201]]


def test_union_and_intersection(abc):
    union = align(abc, "union")
    assert union.tokens == ("<unk>", "x", "y", "z", "w") and not union.same_tokenizer
    assert filled(union, tables(4, 4)) == [[100, 101, 102, 103, 203], [200, 202, 102, 201, 203]]
    both = align(abc, "intersection")
    assert both.tokens == ("<unk>", "x", "z")
    assert filled(both, tables(4, 4)) == [[100, 101, 103], [200, 202, 201]]


def test_without_a_base_missing_rows_are_means(tmp_path, abc):
    third = plain(tmp_path / "c", ["<unk>", "w"])
    alignment = align([*abc, third], "union", base=None)
    assert filled(alignment, tables(4, 4, 2))[2] == [300, (101 + 202) / 2, 102, (103 + 201) / 2, 301]


def test_the_tokenizer_of_one_model_with_the_rows_of_another(abc):
    alignment = align(abc, 1, base=0)
    assert alignment.tokens == ("<unk>", "z", "x", "w")
    assert filled(alignment, tables(4, 4)) == [[100, 103, 101, 203], [200, 201, 202, 203]]
    assert alignment.config_changes({"eos_token_id": 3, "bos_token_id": [1, 2]}, abc[0]) == {
        "eos_token_id": 1, "bos_token_id": [2],
    }  # fmt: skip


def test_padding_rows_stay(abc):
    alignment = align(abc, "base", rows=[6, 5])
    assert alignment.size == 6 and alignment.tokens[4:] == (None, None)
    assert filled(alignment, tables(6, 5)) == [[100, 101, 102, 103, 104, 105], [200, 202, 102, 201, 204, 105]]
    union = align(abc, "union", rows=[6, 5])
    assert union.tokens == ("<unk>", "x", "y", "z", "w", None) and union.size == 6
    assert union.config_changes({"vocab_size": 6}, abc[0]) == {}


def test_rows_that_an_embedding_does_not_have_are_not_read(abc):
    alignment = align(abc, "base", rows=[3, 2])
    assert alignment.tokens == ("<unk>", "x", "y") and alignment.rows[1].tolist() == [0, -1, -1] and alignment.notes


def test_padding_to_a_multiple(abc):
    alignment = align(abc, "union", pad_to_multiple_of=8)
    assert alignment.size == 8 and alignment.plan(0).padding.tolist() == [5, 6, 7]
    config = {"vocab_size": 4, "text_config": {"vocab_size": 4}, "vision_config": {"vocab_size": 99}}
    assert alignment.config_changes(config, abc[0]) == {"vocab_size": 8, "text_config.vocab_size": 8}


def test_rules_for_single_tokens(abc):
    donors = {
        "x": Donor(1, force=True), "y": Donor(1, token="w"), "n": Donor(0, token_id=3), "o": Donor(None), "w": None,
    }  # fmt: skip
    alignment = align(abc, "base", donors=donors)
    assert alignment.tokens == ("<unk>", "x", "y", "z", "n", "o", "w")
    assert filled(alignment, tables(4, 4)) == [
        [100, 202, 102, 103, 103, 0, 203], [200, 202, 203, 201, 103, 0, 203],
    ]  # fmt: skip
    for wrong in (Donor(0, token="nope"), Donor(0, token_id=4), Donor(0)):
        with pytest.raises(SurgeryError, match="which has none"):
            align(abc, "base", donors={"w": wrong})
    with pytest.raises(SurgeryError, match="no way 'both'"):
        align(abc, "both")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.permutations("abcdefg"), min_size=2, max_size=3), st.data())
def test_every_row_is_its_token(orders, data):
    """However vocabularies are cut and ordered, a model's own row always carries the token's own string."""
    vocabularies = []
    for order in orders:
        tokens = order[: data.draw(st.integers(1, 7))]
        raw = {"model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}}
        vocabularies.append(Vocabulary("v", raw["model"]["vocab"], {}, {}, "WordLevel", raw))
    alignment = align(vocabularies, data.draw(st.sampled_from(["base", "union", "intersection", 1])))
    strings = [[v.by_id[r] for r in range(v.size)] for v in vocabularies]
    everywhere = set.intersection(*(set(v.tokens) for v in vocabularies))
    for i, rows in enumerate(alignment.rows):
        for token, row in zip(alignment.tokens, rows, strict=True):
            assert row == -1 if token not in vocabularies[i].tokens else strings[i][row] == token
    assert everywhere <= set(alignment.tokens) or len(set(alignment.tokens)) == vocabularies[1].size
    assert len(set(alignment.tokens)) == alignment.size
    for i in range(len(vocabularies)):
        plan = alignment.plan(i)
        covered = [*plan.out, *plan.lent_out, *(k for k, _ in plan.means), *plan.zeros, *plan.padding]
        assert sorted(covered) == list(range(alignment.size))


# --- writing ------------------------------------------------------------------------------------------------------


def loaded(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("build", [bpe, wordlevel, wordpiece, unigram])
def test_union_loads_and_encodes(tmp_path, build):
    base_tokenizer = build(PROSE, ["<unk>", "</s>"])
    other_tokenizer = build(CODE, ["<unk>", "</s>"])
    other_tokenizer.add_special_tokens(CHATML)
    base = Vocabulary.open(save(base_tokenizer, tmp_path / "a", eos_token="</s>", unk_token="<unk>"))
    other = Vocabulary.open(save(other_tokenizer, tmp_path / "b", eos_token="<|im_end|>", unk_token="<unk>"))
    alignment = align([base, other], "union")
    tokenizer = loaded(write_tokenizer(alignment, tmp_path / "out"))
    ids = alignment.ids

    assert tokenizer.get_vocab() == ids and len(tokenizer) == alignment.size
    assert tokenizer.eos_token == "</s>"
    assert ids.items() >= base.tokens.items() and ids.keys() == base.tokens.keys() | other.tokens.keys()
    for token in CHATML:
        assert tokenizer.encode(f"the{token}cat", add_special_tokens=False).count(ids[token]) == 1
        assert token in tokenizer.all_special_tokens or tokenizer.added_tokens_decoder[ids[token]].special
    # words of the other model that become one token there become one token here
    words = ["range", "return", " return" if build is bpe else "print"]
    whole = [w for w in words if len(other_tokenizer.encode(w, add_special_tokens=False).ids) == 1]
    assert whole or build is unigram
    for word in whole:
        (token_id,) = other_tokenizer.encode(word, add_special_tokens=False).ids
        want = ids[other_tokenizer.id_to_token(token_id)]
        assert tokenizer.encode(word, add_special_tokens=False) == [want], word


def test_union_keeps_the_splitting_of_the_base(tmp_path):
    base_tokenizer = bpe(PROSE, ["<s>"])
    base = Vocabulary.open(save(base_tokenizer, tmp_path / "a", bos_token="<s>", tokenizer_class="GPT2Tokenizer"))
    other = Vocabulary.open(save(bpe(["zq zq zqzq xj xj"], ["<s>"]), tmp_path / "b", bos_token="<s>"))
    tokenizer = loaded(write_tokenizer(align([base, other], "union"), tmp_path / "out"))
    for text in PROSE:
        assert tokenizer.encode(text) == base_tokenizer.encode(text).ids
    assert len(tokenizer.encode("zq", add_special_tokens=False)) == 1
    assert tokenizer.decode(tokenizer.encode("the zq cat", add_special_tokens=False)) == "the zq cat"


@pytest.mark.parametrize("build", [bpe, wordlevel, wordpiece, unigram])
def test_intersection_loads_and_is_renumbered(tmp_path, build):
    base = Vocabulary.open(save(build(PROSE, ["<unk>", "</s>"]), tmp_path / "a", eos_token="</s>"))
    other = Vocabulary.open(save(build(PROSE[:2] + CODE, ["</s>", "<unk>"]), tmp_path / "b", eos_token="</s>"))
    alignment = align([base, other], "intersection")
    assert 0 < alignment.size < base.size
    tokenizer = loaded(write_tokenizer(alignment, tmp_path / "out"))
    assert tokenizer.get_vocab() == alignment.ids
    text = "the cat sat"
    if build is bpe:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        assert tokenizer.encode(text)[0] == alignment.ids["<unk>"]  # the post-processor's id, renumbered


def test_added_tokens_behind_the_vocabulary_keep_their_ids(tmp_path):
    """The base has an added token behind its vocabulary; new words come after it."""
    base = plain(tmp_path / "a", ["<unk>", "x"], special=["<pad>"], pad_token="<pad>")
    other = plain(tmp_path / "b", ["<unk>", "x", "y", "z"], special=CHATML)
    alignment = align([base, other], "union", donors={"<new>": Donor(None)})
    assert alignment.tokens == ("<unk>", "x", "<pad>", "y", "z", *CHATML, "<new>")
    tokenizer = loaded(write_tokenizer(alignment, tmp_path / "out"))
    assert tokenizer.encode("x<pad>y <|im_end|>z<new>") == [1, 2, 3, 6, 4, 7] and tokenizer.pad_token_id == 2


def test_a_config_with_a_token_table_stays_in_step(tmp_path):
    table = {"added_tokens_decoder": {"2": {"content": "<pad>", "special": True}}}
    base = plain(tmp_path / "a", ["<unk>", "x"], special=["<pad>"], pad_token="<pad>", **table)
    other = plain(tmp_path / "b", ["<unk>", "y"], special=CHATML)
    out = write_tokenizer(align([base, other], "union"), tmp_path / "out")
    written = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {i: t["content"] for i, t in written.items()} == {"2": "<pad>", "4": CHATML[0], "5": CHATML[1]}
    assert loaded(out).convert_tokens_to_ids(["<pad>", *CHATML]) == [2, 4, 5]


def test_reading_needs_no_heavy_import():
    import subprocess
    import sys

    code = (
        "import sys, surgery.checkpoint.token_alignment, surgery.checkpoint.tokenizer_files;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
