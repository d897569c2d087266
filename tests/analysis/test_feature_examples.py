"""Examples are those of a brute-force search, whatever the batches; tokens read as they are; strange input is told."""

import numpy as np
import pytest
import torch
from rich.console import Console

from analysis.features import Reader, examples
from analysis.features import best as best_module
from analysis.features.words import spelled, spelling, token_bytes, token_text, token_texts
from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.sae.activations import Stream, real_tokens
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import TopK
from surgery.tasks import make_task

SITE = "resid_post.2"
TEXTS = [r["prompt"] + r["completion"] for t in ("copy", "sort", "chain") for r in (
    e.row(t) for e in make_task(t).examples(9, seed=1))]  # fmt: skip
LATENTS = 24


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    (base, tokenizer), (tuned, _) = load("tiny-base", "float32"), load("tiny-chain", "float32")
    return base, tuned, tokenizer


def dictionary(width=96, models=1, seed=0):
    return Dictionary(width * models, LATENTS, TopK(k=3), models=models, seed=seed)


@pytest.fixture(scope="module")
def reader(models):
    return Reader(dictionary(), models[0], SITE, models[2])


def brute(reader, texts):
    """(text, position, latents) f of every text by itself, NaN where a token does not count."""
    found = []
    for text in texts:
        batch = encode(reader.tokenizer, [text])
        (rows,) = Stream(reader.models, [reader.site], [batch])
        f = reader.dictionary.codes(rows[reader.site]).dense().detach().numpy()
        found.append(np.concatenate([np.full((1, LATENTS), np.nan, dtype=np.float32), f]))
    return found


def test_the_greatest_of_every_latent(reader):
    found, every = examples(reader, TEXTS, k=4, before=5, after=2), brute(reader, TEXTS)
    values = np.concatenate([f[1:] for f in every])
    table = found.table()
    assert found.tokens == len(values) and found.texts == len(TEXTS)
    np.testing.assert_array_equal(table["tokens"], (values > 0).sum(0))
    np.testing.assert_allclose(found.sums, values.sum(0), rtol=1e-4)
    np.testing.assert_array_equal(found.histogram.sum(1), (values > 0).sum(0))
    for latent in range(LATENTS):
        peaks = np.array([np.nanmax(f[:, latent]) for f in every])
        expected = sorted(peaks[peaks > 0], reverse=True)[:4]
        mine = found.of(latent)
        np.testing.assert_allclose([e.value for e in mine], expected, rtol=1e-4)
        assert len({e.text for e in mine}) == len(mine)
        for e in mine:
            ids = encode(reader.tokenizer, [TEXTS[e.text]]).ids[0].tolist()
            start = e.position - e.peak
            assert e.ids == ids[start : start + len(e.ids)] and len(e.ids) == min(8, len(ids))
            np.testing.assert_allclose(e.activations, every[e.text][start : start + len(e.ids), latent], rtol=1e-4,
                                       atol=1e-6)  # fmt: skip
            assert e.activations[e.peak] == pytest.approx(e.value)


def test_batches_change_nothing(models):
    """Of texts that begin differently: after the same beginning activations are equal but for rounding."""
    draw = torch.Generator().manual_seed(0)
    texts = [[1, 3 + i, *torch.randint(3, 45, (3 + i % 9,), generator=draw).tolist()] for i in range(40)]
    readers = [Reader(dictionary(), models[0], SITE, models[2], batch_size=size) for size in (1, 7, 100)]
    tables = [examples(r, texts, k=3, random=2).to_dataframe() for r in readers]
    for other in tables[1:]:
        for column in ("latent", "kind", "rank", "text", "position", "token", "context"):
            assert list(other[column]) == list(tables[0][column])
        np.testing.assert_allclose(other["activation"], tables[0]["activation"], rtol=1e-4)
    left = encode(models[2], texts, side="left")
    padded = examples(readers[0], left, k=3).to_dataframe()
    assert list(padded["context"]) == list(tables[0][tables[0]["kind"] == "top"]["context"])


def test_a_text_that_comes_again_is_one_example(reader):
    once, twice = examples(reader, TEXTS, k=5), examples(reader, [*TEXTS, *TEXTS[:20]], k=5)
    assert list(once.to_dataframe()["context"]) == list(twice.to_dataframe()["context"])
    assert twice.tokens > once.tokens and (twice.fired >= once.fired).all()


def test_chosen_latents_are_those_of_all(reader):
    every, some = examples(reader, TEXTS, k=2, random=1), examples(reader, TEXTS, [7, 3], k=2, random=1)
    for latent in (3, 7):
        for kind in ("top", "random"):
            pairs = zip(every.of(latent, kind), some.of(latent, kind), strict=True)
            assert all(a.text == b.text and a.position == b.position and a.latent == b.latent for a, b in pairs)
    assert some.table().loc[7].tolist() == every.table().loc[7].tolist()


def test_examples_by_chance_are_drawn_from_all_active_tokens(reader):
    """Each active token as often as any other, within five standard errors; never one that is not active."""
    every = np.concatenate([f[1:] for f in brute(reader, TEXTS)])
    latent = int((every > 0).sum(0).argmax())
    ranks = [e.quantile for seed in range(60)
             for e in examples(reader, TEXTS, [latent], k=0, random=1, seed=seed).of(latent, "random")]  # fmt: skip
    assert len(ranks) == 60 and abs(np.mean(ranks) - 0.5) < 5 * 0.29 / np.sqrt(60)


def test_crosscoders_and_differences(models):
    base, tuned, tokenizer = models
    batch = encode(tokenizer, TEXTS[:6])
    (rows,) = Stream([base, tuned], [SITE], [batch])
    before, after = rows[SITE].chunk(2, dim=1)
    cross, other = dictionary(models=2), dictionary(seed=3)
    for reader, x in ((Reader(cross, [base, tuned], SITE, tokenizer), rows[SITE]),
                      (Reader(other, [base, tuned], SITE, tokenizer, difference=True), after - before)):  # fmt: skip
        with torch.no_grad():
            expected = reader.dictionary.codes(x).dense().amax(0)
        found = examples(reader, TEXTS[:6], k=1)
        torch.testing.assert_close(torch.from_numpy(found.largest).float(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(Reader(cross, [base, tuned], SITE).decoder("base"), cross.decoder[:, :96])
    assert torch.equal(Reader(other, [base, tuned], SITE, difference=True).decoder("base"), -other.decoder)


# ---- looks


def test_coloured_text_is_escaped_and_marked(models):
    """A token that looks like markup is text, and the token that is meant is marked without colours too."""
    base, _, _ = models

    class Evil:
        """Every token is a tag."""

        pad_token_id = eos_token_id = 0

        def convert_ids_to_tokens(self, token):
            return f"<b onload=x{token}>"

        def decode(self, ids, **_):
            return f"<b onload=x{ids[0]}>"

    reader = Reader(dictionary(), base, SITE, Evil())
    found = examples(reader, [[1, 5, 6, 7], [1, 8, 9, 10]], k=2, random=1)
    latent = int(found.fired.argmax())
    page = found.html(latent).document
    assert "<b" not in page.replace("<body", "") and "&lt;b·onload" in page and "<script" not in page
    console = Console(width=200, no_color=True, force_terminal=False)
    with console.capture() as out:
        console.print(found.rich(latent))
    assert "«<b·onload=x" in out.get() and out.get().count("«") == len(found.of(latent))
    styled = found.rich(latent)
    assert any(span.style.underline for span in styled.spans if not isinstance(span.style, str))


def test_figures(reader):
    found = examples(reader, TEXTS, k=2)
    assert len(found.plot().axes) == 1
    assert sum(axis.axison for axis in found.plot([0, 1, 2, 3]).axes) == 4
    axis = found.plot([0]).axes[0]
    low, high = (axis.get_xticks()[i] for i in (0, -1))
    assert axis.get_xlabel() == "activation" and low <= found.of(0)[0].value <= high
    assert axis.get_xticklabels()[0].get_text() == f"{low:.3g}"


# ---- tokens


class Bytes:
    """A byte-level vocabulary of a few tokens, as GPT-2's."""

    tokens = ("Ġcaf", "Ã©", "ä½", "ł", "<think>", "Ġ", "Ċ", "<0xE2>")
    table = (b" caf", "é".encode(), "你".encode()[:2], "你".encode()[2:], b"<think>", b" ", b"\n", b"\xe2")

    def convert_ids_to_tokens(self, token):
        return self.tokens[token]

    def decode(self, ids, **_):
        return b"".join(self.table[i] for i in ids).decode(errors="replace")


def test_tokens_that_are_half_a_character():
    names = Bytes()
    assert [token_bytes(names, i) for i in range(8)] == list(Bytes.table)
    assert [token_text(names, i) for i in range(8)] == [
        " caf",
        "é",
        "\\xe4\\xbd",
        "\\xa0",
        "<think>",
        " ",
        "\n",
        "\\xe2",
    ]
    assert token_texts(names, [0, 1, 2, 3, 5]) == [" caf", "é", "你", "\\xa0", " "]
    assert token_texts(names, [3, 2, 2, 3, 7]) == ["\\xa0", "\\xe4\\xbd", "你", "\\xa0", "\\xe2"]
    assert token_texts(names, [2]) == ["\\xe4\\xbd"] and token_texts(names, []) == []
    assert spelled(names, [0, 1, 2, 3, 5]) == " café你 "


def test_strings_are_found_however_they_are_cut(models):
    names = Bytes()
    assert spelling(names, [0, 1, 2, 3, 4], "你") == [False, False, True, True, False]
    assert spelling(names, [0, 4, 5, 4], "<think>") == [False, True, False, True]
    assert spelling(names, [0, 1, 5], "fé") == [True, True, False]
    ids = encode(models[2], ["m 1+1="]).ids[0].tolist()
    assert spelling(models[2], ids, "1+1") == [False, False, False, True, True, True, False]
    with pytest.raises(SurgeryError, match="tokenizer"):
        spelling(None, [1], "a")


# ---- what is refused


def test_what_does_not_fit_is_refused(models, reader):
    base, tuned, tokenizer = models
    cases = [
        (lambda: list(Reader(dictionary(48), base, SITE, tokenizer).read(TEXTS)), "reads activations of 48 numbers"),
        (lambda: Reader(dictionary(models=2), base, SITE), "reads 2 models, and 1 is given"),
        (lambda: Reader(dictionary(), [base, tuned], SITE), "reads 1 model, and 2 are given"),
        (lambda: Reader(dictionary(models=2), [base, tuned], SITE, difference=True), "reads activations, and no diff"),
        (lambda: Reader(dictionary(), base, "resid_post"), "is in several layers"),
        (lambda: Reader(dictionary(), base, "resid_post.1@-1"), "every token"),
        (lambda: Reader(dictionary(), base, "resid_pots.1"), "no site"),
        (lambda: examples(reader, TEXTS, [3, LATENTS]), f"no latent {LATENTS}"),
        (lambda: examples(reader, []), "no text"),
        (lambda: examples(reader, "m 1+1="), "come in a list"),
        (lambda: examples(Reader(dictionary(), base, SITE), TEXTS), "tokenizer"),
        (lambda: examples(reader, [[1]]), "No token of these texts counts"),
        (lambda: examples(reader, TEXTS, [1]).of(2), "latent 2 were not looked for"),
        (lambda: examples(reader, TEXTS, k=-1), "0 or more"),
        (lambda: reader.model("other"), "no model 'other'"),
    ]  # fmt: skip
    for act, said in cases:
        with pytest.raises(SurgeryError, match=said):
            act()


def test_memory_is_checked_before_it_is_taken(reader, monkeypatch):
    monkeypatch.setattr(best_module, "LIMIT", 1000)
    with pytest.raises(SurgeryError, match="GiB"):
        examples(reader, TEXTS)


def test_the_model_is_untouched(models, reader):
    base = models[0]
    base.train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(SurgeryError):
        examples(reader, [*TEXTS, ""[:0], []])
    examples(Reader(dictionary(), base, SITE, models[2], keep=real_tokens(0)), TEXTS[:3])
    assert base.training and not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    base.eval()
