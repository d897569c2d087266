"""Token-coloured text: colours that say the value, and tokens that can do nothing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis.html import Html, _ink, _luminance, coloured, coloured_many, page
from analysis.style import INK, SIGNED
from surgery.errors import SurgeryError


class Reader(HTMLParser):
    """Tags and attributes as a browser sees them, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def tokens(self):
        return [a for tag, a in self.tags if tag == "span" and "title" in a]


def background(span) -> str:
    return re.search("background:(#[0-9a-f]{6})", span["style"])[1]


def test_every_token_is_a_span_with_its_value():
    seen = Reader(coloured(["The", " cat", "\n", "sat"], [0.0, -2.0, 1.0, np.nan], centre=0, ids=[5, 6, 7, 8],
                           unit="KL", caption="a < b")._repr_html_())  # fmt: skip
    spans = seen.tokens()
    assert [s["title"] for s in spans] == ["0: 'The', id 5, KL 0", "1: '·cat', id 6, KL -2", "2: '↵', id 7, KL 1",
                                           "3: 'sat', id 8, no KL"]  # fmt: skip
    assert background(spans[0]) == "#ffffff" and background(spans[1]) == "#9c1c2e"  # white at 0, red at the limit
    assert ["underline" in s["style"] for s in spans] == [False, True, False, False]
    assert "background" not in spans[3]["style"] and "dotted" in spans[3]["style"]
    text = "".join(seen.text)
    assert (
        text.startswith("a < bThe·cat↵sat")
        and "underlined: negative" in text
        and "-2" in text
        and ("br", {}) in seen.tags
    )


def test_a_token_is_never_markup(tmp_path):
    evil = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;", "\u202e", "\ud800", "]]>", "'", ""]
    made = coloured(evil, range(len(evil)), title=evil[0], caption=evil[1], unit=evil[0])
    path = page(evil[0], made, *evil, coloured(evil, [1] * 8, title=evil[4], caption=evil[3], unit=evil[4])).save(
        tmp_path / "deep" / "page.html"
    )
    seen = Reader(path.read_text(encoding="utf-8"))
    ours = {"html", "head", "meta", "title", "body", "div", "span", "wbr", "h2", "h3", "p", "u"}
    assert {tag for tag, _ in seen.tags} <= ours
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on") or name == "src"]
    assert len(seen.tokens()) == 2 * len(evil) and evil[0] in "".join(seen.text) and "&lt;" in seen.text
    assert "\u202e" not in path.read_text(encoding="utf-8")


def test_letters_stand_out_on_every_colour():
    for colours in (INK, SIGNED):
        for share in np.linspace(0, 1, 101):
            colour = "#" + "".join(f"{round(255 * c):02x}" for c in colours(share)[:3])
            light, ink = _luminance(colour), 0.0 if _ink(colour) == "#000" else 1.0
            assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) >= 4.5  # WCAG 2, AA
    assert _luminance("#ffffff") == pytest.approx(1) and _luminance("#000000") == 0
    assert _luminance("#808080") == pytest.approx(0.2159, abs=1e-4)


def test_texts_share_one_scale_and_one_legend():
    both = coloured_many([(["a"], [1.0]), (["b"], [4.0])], captions=["one", "two"])
    first, second = Reader(both.body).tokens()
    assert background(second) == "#333333" and background(first) not in ("#ffffff", "#333333")
    assert both.body.count("linear-gradient") == 1 and "underlined" not in both.body
    alone = Reader(coloured(["a"], [1.0], limits=(0, 4)).body).tokens()[0]
    assert background(alone) == background(first)
    over = Reader(coloured(["a", "b"], [9.0, 4.0], limits=(0, 4)).body).tokens()
    assert background(over[0]) == background(over[1]) == "#333333"
    assert Reader(coloured([], []).body).tokens() == []


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_page_needs_nothing_else(tmp_path, kind):
    figure = Figure()
    figure.subplots().plot([1, 2])
    figure.suptitle("a <curve>")
    whole = page("both", "words", figure, coloured(["a"], [1.0]), figures=kind)
    seen = Reader(whole.save(tmp_path / "p.html").read_text(encoding="utf-8"))
    (image,) = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert image["alt"] == "a <curve>" and image["src"].startswith("data:image/")
    links = [v for tag, a in seen.tags for k, v in a.items() if k in ("href", "src") and not v.startswith("data:")]
    assert not links and "http:" not in whole.document and "https:" not in whole.document
    assert "default-src 'none'" in whole.document and isinstance(whole, Html)
    if kind == "svg":
        assert page("both", figure).body == page("both", figure).body


def test_what_does_not_fit_is_said():
    wrong = [
        (lambda: coloured(["a"], [1.0, 2.0]), "1 tokens"),
        (lambda: coloured(["a"], [1], ids=[]), "0 ids"),
        (lambda: coloured(["a"], [1], limits=(2, 1)), "must rise"),
        (lambda: coloured_many([(["a"], [1])], captions=[]), "0 captions"),
        (lambda: page("t", 3), "not int"),
    ]
    for call, what in wrong:
        with pytest.raises(SurgeryError, match=what):
            call()
