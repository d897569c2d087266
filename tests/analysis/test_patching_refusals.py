"""What a sweep is asked for and can't do is named, and nothing is lost."""

import pytest
import torch
from activations.families import build, prompts
from activations.state import disturbed, unchanged
from helpers import tiny_checkpoint

from analysis.metrics import Metric, logit_diff, prob
from analysis.patching import ablate, patch
from surgery.errors import SurgeryError
from surgery.models import encode, load

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
DIFF = logit_diff(ANSWERS)
SHORT = [row[:n].tolist() for row, n in zip(CORRUPT, (9, 8, 9, 9), strict=True)]


@pytest.fixture(scope="module")
def gpt2():
    return disturbed(build("gpt2"))


@pytest.mark.parametrize(
    "arguments, more, sentence",
    [
        ((CLEAN, SHORT, DIFF), {}, "(?s)Pair 1: the clean prompt is 9 tokens long, the corrupt one 8; .*anchors="),
        ((CLEAN, CORRUPT[:3], DIFF), {}, "There are 4 clean prompts and 3 corrupt ones: they come in pairs"),
        (([], [], DIFF), {}, "No prompts"),
        ((CLEAN[:0], CORRUPT[:0], DIFF), {}, "No prompts"),
        (([[3, 4], []], [[3, 5], []], DIFF), {}, "Prompt 1 has no tokens"),
        (("a text", "another", DIFF), {}, "Prompts come in a list, and this is one prompt"),
        ((["a text"], ["another"], DIFF), {}, "pass tokenizer="),
        ((CLEAN, CORRUPT, DIFF.select([0, 1])), {}, "The metric 'logit_diff' is made for 2 examples, and there are 4"),
        ((CLEAN, CORRUPT, logit_diff(ANSWERS + 60)), {}, "The answer 11. is no token: the model knows 0 to 59"),
        ((CLEAN, CORRUPT, "logit_diff"), {}, "A metric is a function of logits, and str is none"),
        ((CLEAN, CORRUPT, lambda logits: logits.mean()), {}, r"The metric '<lambda>' gave \(\), and one value"),
        ((CLEAN, CORRUPT, DIFF, "resid"), {}, "(?s)no site 'resid'.*resid_"),
        ((CLEAN, CORRUPT, DIFF, "z.1"), {}, "(?s)A sweep goes over all of 'z', and 'z.1' names a part.*layers="),
        ((CLEAN, CORRUPT, DIFF, "blocks.1.attn.hook_z"), {}, "names a part of it"),
        ((CLEAN, CORRUPT, DIFF, "z@-1"), {}, "names a part of it"),
        ((CLEAN, CORRUPT, DIFF, "embed"), {}, "(?s)'embed' is in no layer.*'resid_pre' of layer 0"),
        ((CLEAN, CORRUPT, DIFF), {"direction": "backwards"}, "direction='backwards': expected 'denoising' or"),
        ((CLEAN, CORRUPT, DIFF), {"by": "head"}, "by='head': expected 'position' or 'all'"),
        ((CLEAN, CORRUPT, DIFF), {"by": "all", "positions": [3]}, "positions= choose single positions, and by='all'"),
        ((CLEAN, CORRUPT, DIFF), {"layers": [3]}, "there is no layer 3; layers are 0 to 2"),
        ((CLEAN, CORRUPT, DIFF), {"layers": [-1]}, "there is no layer -1; layers are 0 to 2"),
        ((CLEAN, CORRUPT, DIFF), {"layers": []}, r"layers=\[\]: whole numbers are expected, one at least"),
        ((CLEAN, CORRUPT, DIFF), {"layers": "all"}, "layers='all': whole numbers are expected"),
        ((CLEAN, CORRUPT, DIFF), {"positions": [9]}, "There is no position 9: the prompts have 9 to 9 tokens"),
        ((CLEAN, CORRUPT, DIFF), {"positions": [-10]}, "There is no position -10"),
        ((CLEAN, CORRUPT, DIFF), {"positions": []}, r"positions=\[\]: whole numbers are expected"),
        ((CLEAN, CORRUPT, DIFF), {"parts": [0]}, "'resid_pre' has no heads: parts= can't choose among them"),
        ((CLEAN, CORRUPT, DIFF, "z"), {"parts": [4]}, "there is no head 4; heads are 0 to 3"),
        ((CLEAN, CORRUPT, DIFF, "z"), {"parts": [-1]}, "there is no head -1"),
        ((CLEAN, CORRUPT, DIFF, "mlp_post"), {"parts": [128]}, "there is no neuron 128; neurons are 0 to 127"),
        ((CLEAN, SHORT, DIFF), {"anchors": {}}, "No anchors were named"),
        ((CLEAN, SHORT, DIFF), {"anchors": {"it": (0, 8)}}, "The anchor 'it' of prompt 1 is 8, and it has 8 tokens"),
        ((CLEAN, SHORT, DIFF), {"anchors": {"it": ([1, 2], 0)}}, "The anchor 'it' is one number, or one for"),
        ((CLEAN, SHORT, DIFF), {"anchors": {"it": (1, 2, 3)}}, r"The anchor 'it' is \(1, 2, 3\): a place in the clean"),
        ((CLEAN, SHORT, DIFF), {"anchors": {"it": "end"}}, "The anchor 'it' is 'end': a place in the clean"),
        ((CLEAN, SHORT, DIFF), {"anchors": {"it": (0, 0)}, "positions": [1]}, "positions= can't be used with anchors"),
        ((CLEAN, SHORT, DIFF), {"anchors": {"it": (0, 0)}, "by": "all"}, "by='all' can't be used with anchors"),
        ((CLEAN, SHORT, DIFF, "pattern"), {"anchors": {"it": (0, 0)}}, "site='pattern' can't be used with anchors"),
    ],
)  # fmt: skip
def test_a_sentence_and_nothing_lost(gpt2, arguments, more, sentence):
    with unchanged(gpt2), pytest.raises(SurgeryError, match=sentence):
        patch(gpt2, *arguments, **more)


@pytest.mark.parametrize(
    "name, site, sentence",
    [
        ("gpt_neox", "resid_mid", "no site 'resid_mid' in gpt_neox: its blocks are parallel"),
        ("mixtral", "mlp_post", "no site 'mlp_post' in mixtral: its MLPs are mixtures of experts"),
    ],
)
def test_sites_that_an_architecture_has_not(name, site, sentence):
    model = disturbed(build(name))
    for sweep in (lambda: patch(model, CLEAN, CORRUPT, DIFF, site), lambda: ablate(model, CLEAN, DIFF, site)):
        with unchanged(model), pytest.raises(SurgeryError, match=sentence):
            sweep()


def test_key_value_heads_are_counted_as_such():
    with pytest.raises(SurgeryError, match="there is no key-value head 2; key-value heads are 0 to 1"):
        patch(build("llama_gqa"), CLEAN, CORRUPT, DIFF, "v", parts=[2])


def test_baselines_that_coincide():
    found = patch(build("gpt2"), CLEAN, CLEAN, DIFF)
    with pytest.raises(
        SurgeryError, match="(?s)baselines coincide: mean clean - corrupt is 0.*clean and corrupt differ"
    ):
        found.normalized()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("reuse", [True, False])
def test_an_exception_in_a_metric(gpt2, error, reuse):
    calls = []

    def value(logits):
        calls.append(0)
        if len(calls) > 3:  # in the middle of the sweep
            raise error("mine")
        return logits[..., 0]

    every = lambda logits: value(logits[:, -1])  # noqa: E731
    last = Metric("mine", lambda logits, answer: value(logits), "last", columns={"answer": ANSWERS[:, 0]})
    for metric in (every, last):
        calls.clear()
        with unchanged(gpt2), pytest.raises(error, match="mine"):
            patch(gpt2, CLEAN, CORRUPT, metric, budget=1 if reuse and metric is last else 1 << 30, reuse=reuse)


def test_texts_and_their_tokens(tmp_path):
    model, tokenizer = load(tiny_checkpoint(tmp_path))
    clean, corrupt = ["w1 w2 w3", "w4 w2 w9"], ["w1 w5 w3", "w4 w5 w9"]
    found = patch(model, clean, corrupt, prob([7, 8]), tokenizer=tokenizer)
    assert found.meta["ticks"]["position"] == ["0", "1 'w5'", "2"]  # where all agree in what is changed
    anchored = patch(
        model, clean, ["w1 w5", "w5 w9 w9 w9"], prob([7, 8]), anchors={"it": (1, [1, 0])}, tokenizer=tokenizer
    )
    assert anchored.meta["ticks"]["position"] == ["it 'w5'"]
    same = patch(model, encode(tokenizer, clean), encode(tokenizer, corrupt), prob([7, 8]))
    assert (same.values == found.values).all() and "ticks" not in same.meta
    with pytest.raises(SurgeryError, match="Pair 1: the clean prompt is 3 tokens long, the corrupt one 2"):
        patch(model, clean, ["w1 w5 w3", "w1 w2"], prob([7, 8]), tokenizer=tokenizer)
