"""Detection, coverage and diversity by hand; figures and the page hold what they say, and nothing else."""

import re
from itertools import combinations

import numpy as np
import pytest

from analysis.html import table
from analysis.novelty import (
    contrast_figure,
    coverage,
    coverage_figure,
    detection,
    distinct,
    labelled,
    novelty,
    report,
    report_html,
    similarity,
    top_tokens,
)
from surgery.errors import SurgeryError
from surgery.logits.contrasts import Contrasted, TokenContrast
from surgery.logits.explore import Exploration


def text(words, contrast=None, **more):
    contrast = [1.0] * len(words) if contrast is None else contrast
    return Contrasted(words, [ord(c) for c in words], list(words), [-1.0] * len(words), contrast, **more)


TEXTS = [text("abab"), text("abcd", [2.0, 0.0, 0.0, -1.0]), text("dcba"), text("abab", [0.5] * 4)]
LABELS = ["x", None, "y", "old"]
DOMAINS = ["x", "y", "z"]


def test_detection_is_the_share_of_texts_in_a_novel_domain():
    found = detection(TEXTS, LABELS, DOMAINS)
    assert found.values.tolist() == [1, 0, 1, 0] and found.binary
    assert found.columns["label"] == ["x", None, "y", None] and found.columns["text"][2] == "dcba"
    assert detection(TEXTS, LABELS).mean == 0.75, "without domains, every label is new"
    assert detection(Exploration(TEXTS, [1]), lambda t: "x" if "ab" in t else None).values.tolist() == [1, 1, 0, 1]


def test_coverage_counts_each_domain_from_its_first_text_on():
    found = coverage(TEXTS, LABELS, DOMAINS)
    assert found.values.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert found.axes["texts"] == [1, 2, 3, 4]
    assert found.mean == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])


def test_coverage_without_order_is_the_mean_over_all_subsets():
    labels = ["x", "x", "y", None, None, "x"]
    texts = [text("ab")] * 6
    found = coverage(texts, labels, DOMAINS, ordered=False)
    for k in range(1, 7):
        shares = [[d in {labels[i] for i in chosen} for d in DOMAINS] for chosen in combinations(range(6), k)]
        assert found.values[:, k - 1] == pytest.approx(np.mean(shares, axis=0))


def test_distinct_is_the_share_of_different_grams_and_similarity_the_mean_over_pairs():
    grams = [{"ab", "ba"}, {"ab", "bc", "cd"}, {"dc", "cb", "ba"}, {"ab", "ba"}]
    assert float(distinct(TEXTS).mean) == pytest.approx(len(set.union(*grams)) / 12)
    assert float(distinct([*TEXTS, text("ab")], 2).mean) == pytest.approx(6 / 13), "texts of other lengths as well"
    pairs = [len(a & b) / len(a | b) for a, b in combinations(grams, 2)]
    found = similarity(TEXTS)
    assert float(found.mean) == pytest.approx(np.mean(pairs))
    assert float(found.values[0]) == pytest.approx((1 / 4 + 1 / 4 + 1) / 3)


def test_novelty_and_the_tokens_with_most_contrast():
    found = novelty(TEXTS, LABELS)
    assert found.values.tolist() == [1.0, 0.25, 1.0, 0.5] and found.columns["label"] == LABELS
    assert top_tokens(TEXTS, 2) == [("a", 6, pytest.approx(5 / 6 + 1 / 6), 6.0), ("b", 6, pytest.approx(4 / 6), 4.0)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: labelled(TEXTS, ["x"]), "4 texts and 1 labels"),
        (lambda: coverage(TEXTS, LABELS, []), "novel domains"),
        (lambda: coverage(TEXTS, LABELS, ["x", "x"]), "novel domains"),
        (lambda: distinct([text("a")]), "No text has 2"),
        (lambda: similarity(TEXTS[:1]), "two texts"),
        (lambda: similarity([text("ab"), text("a")]), "two texts"),
        (lambda: contrast_figure([]), "no texts"),
        (lambda: report(Exploration([], [1])), "no texts"),
        (lambda: table(["a"], [(1, 2)]), "2 cells under 1"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(SurgeryError, match=said):
        call()


def test_the_curve_ends_at_the_coverage_of_all():
    figure = coverage_figure({"one": coverage(TEXTS, LABELS, DOMAINS), "two": coverage(TEXTS, LABELS, ["x"])})
    lines = figure.axes[0].lines
    assert [line.get_ydata()[-1] for line in lines] == pytest.approx([2 / 3, 1.0])
    assert [line.get_label() for line in lines] == ["one: 0.67", "two: 1.00"]
    assert len({line.get_linestyle() for line in lines}) == 2, "told apart without colour"


def test_contrast_by_text_has_a_marker_a_label():
    figure = contrast_figure(TEXTS, LABELS)
    points = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[0].collections}
    assert points == {"no label": [[2, 0.25]], "old": [[4, 0.5]], "x": [[1, 1.0]], "y": [[3, 1.0]]}
    assert len(contrast_figure(TEXTS).axes[0].collections) == 1


def test_the_page_has_the_texts_by_contrast_with_their_values(tmp_path):
    texts = [text("ab<", [0.25, -0.5, 0.0]), text("xyz", [3.0, 2.0, 1.0], loss=1.5), text("ooo", [0.1] * 3)]
    found = Exploration(texts, [1], {"n": 3, "alpha": 0.1}, interrupted=True)
    prompts = {"m 1+1=": [TokenContrast("<b>", 5, 0.7, -0.1, -0.8)]}
    path = report_html(found, tmp_path / "new" / "page.html", ["sat", None, None], most=2, prompts=prompts)
    words = path.read_text()
    assert (
        words.count("<html") == 1
        and "<script" not in words
        and "<b>" not in words
        and "http" not in words.replace("http-equiv", "").replace("http://www.w3.org", "")
    )
    assert re.findall(r"(\d)\. ([+-][\d.]+) nats a token · text (\d)", words) == [("1", "+2", "2"), ("2", "+0.1", "3")]
    assert "loss 1.5 before it was learned" in words
    assert "0: &#x27;x&#x27;, id 120, contrast (log p tuned - log p base, nats) 3" in words
    assert "alpha 0.1" in words and "Stopped before" in words and "sat 1" in words
    assert "Next tokens after &#x27;m 1+1=&#x27;" in words and "&lt;b&gt;" in words and "0.449" in words
    assert "Tokens with most contrast" in words and words.count("data:image/svg+xml") == 1
    assert report(texts).document.count("nats a token · text") == 3
