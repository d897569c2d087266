"""Names of places: parsing, printing, TransformerLens's names, and what is said of wrong ones."""

import pytest
from activations.families import build
from hypothesis import given
from hypothesis import strategies as st

from surgery.anatomy import SITES, Site, anatomy_of
from surgery.anatomy.sites import UNLAYERED
from surgery.errors import SurgeryError

STREAM = [name for name, kind in SITES.items() if kind == "stream"]
numbers = st.integers(0, 200)


@st.composite
def possible(draw):
    """Any site that a name can be written for."""
    name = draw(st.sampled_from(sorted(SITES)))
    layer = None if name in UNLAYERED else draw(st.none() | numbers)
    head = None if name in STREAM else draw(st.none() | numbers)
    return Site(name, layer, head, draw(st.none() | st.integers(-200, 200)))


@given(possible())
def test_what_is_printed_is_parsed_again(site):
    assert Site.parse(str(site)) == site and Site.parse(site) is site
    assert Site.parse(f"  {site} ") == site


@pytest.mark.parametrize(
    "text, site",
    [
        ("z", Site("z")),
        ("z.3", Site("z", 3)),
        ("z.3.2", Site("z", 3, 2)),
        ("z.3.2@-1", Site("z", 3, 2, -1)),
        ("z.*.2", Site("z", None, 2)),
        ("z.*", Site("z")),
        ("z@0", Site("z", position=0)),
        ("resid_pre.5@-1", Site("resid_pre", 5, None, -1)),
        ("mlp_post.0.47", Site("mlp_post", 0, 47)),
        ("embed", Site("embed")),
        ("final@-1", Site("final", position=-1)),
        ("pattern.1.0@3", Site("pattern", 1, 0, 3)),
    ],
)
def test_short_names(text, site):
    assert Site.parse(text) == site and Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "text, short",
    [
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.3.hook_resid_mid", "resid_mid.3"),
        ("blocks.3.hook_resid_post", "resid_post.3"),
        ("blocks.10.hook_attn_out", "attn_out.10"),
        ("blocks.0.hook_mlp_out", "mlp_out.0"),
        ("blocks.3.attn.hook_q", "q.3"),
        ("blocks.3.attn.hook_k", "k.3"),
        ("blocks.3.attn.hook_v", "v.3"),
        ("blocks.3.attn.hook_z", "z.3"),
        ("blocks.3.attn.hook_pattern", "pattern.3"),
        ("blocks.3.attn.hook_attn_scores", "scores.3"),
        ("blocks.3.mlp.hook_pre", "mlp_pre.3"),
        ("blocks.3.mlp.hook_post", "mlp_post.3"),
        ("hook_embed", "embed"),
        ("embed.hook_out", "embed"),
        ("ln_final.hook_out", "final"),
        ("ln_final.hook_normalized", "final"),
    ],
)
def test_names_of_transformer_lens(text, short):
    assert str(Site.parse(text)) == short


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("resid_per.3", "(?s)no site 'resid_per.3'.*resid_pre"),
        ("attn.3", "no site 'attn.3'"),
        ("z.x", "no site 'z.x'"),
        ("z.-1", "no site 'z.-1'"),
        ("z.1.2.3", "no site 'z.1.2.3'"),
        ("z.1@", "no site 'z.1@'"),
        ("", "no site ''"),
        ("blocks.3.attn.hook_x", "(?s)no site 'blocks.3.attn.hook_x'"),
        ("blocks.3.hook_resid_per", "(?s)no site 'blocks.3.hook_resid_per'.*hook_resid_pre"),
        ("blocks.3.hook_z", "(?s)no site 'blocks.3.hook_z'.*attn.hook_z"),
        ("embed.0", "(?s)'embed' is in no layer, and 'embed.0' names one.*Write 'embed'"),
        ("final.2", "'final' is in no layer"),
        ("resid_pre.3.1", "(?s)'resid_pre' has no heads, and 'resid_pre.3.1' names one.*Write 'resid_pre.3'"),
        ("mlp_in.*.1", r"(?s)'mlp_in' has no heads, and 'mlp_in.\*.1' names one.*Write 'mlp_in', or"),
    ],
)
def test_wrong_names_are_named(text, sentence):
    with pytest.raises(SurgeryError, match=sentence):
        Site.parse(text)


@pytest.mark.parametrize("thing", [3, None, ("z", 3)])
def test_what_is_no_name(thing):
    with pytest.raises(SurgeryError, match="A site is written as text"):
        Site.parse(thing)


@pytest.mark.parametrize(
    "site, sentence",
    [
        ("z.3", "'z.3': there is no layer 3; layers are 0 to 2"),
        ("resid_pre.11@2", "'resid_pre.11@2': there is no layer 11"),
        ("z.0.4", "'z.0.4': there is no head 4; heads are 0 to 3"),
        ("pattern.0.4", "'pattern.0.4': there is no head 4"),
        ("k.0.2", "'k.0.2': there is no key-value head 2; key-value heads are 0 to 1"),
        ("v.*.2", r"'v.\*.2': there is no key-value head 2"),
        ("mlp_post.1.48", "'mlp_post.1.48': there is no neuron 48; neurons are 0 to 47"),
        (Site("z", -1), "there is no layer -1; layers are 0 to 2"),
        (Site("z", 0, -1), "there is no head -1"),
        (Site("embed", 0), "'embed' is in no layer"),
        (Site("attn_out", 0, 1), "'attn_out' has no heads"),
        (Site("resid", 0), "(?s)no site 'resid.0'.*resid_"),
    ],
)
def test_out_of_range(site, sentence):
    with pytest.raises(SurgeryError, match=sentence):
        anatomy_of(build("llama_gqa")).expand([site])


def test_expanding():
    a = anatomy_of(build("llama_gqa"))
    assert list(map(str, a.expand("z.*.1@-1"))) == ["z.0.1@-1", "z.1.1@-1", "z.2.1@-1"]
    assert list(map(str, a.expand(["blocks.1.attn.hook_z", "z.1", Site("z", 1), "final"]))) == ["z.1", "final"]
    assert a.expand([]) == []


def test_parts_of_a_site():
    site = Site.parse("pattern.1.2@3")
    assert site.kind == "pattern" and site.whole == Site("pattern", 1) and site.at(0) == Site("pattern", 0, 2, 3)
    assert Site("q").kind == "heads" and Site("mlp_pre").kind == "neurons" and Site("mlp_in").kind == "stream"
