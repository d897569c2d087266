"""Metrics: their mathematics, the logits that they need, and what is said of wrong ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from activations.families import FAMILIES, LLAMA_LIKE, build, prompts
from helpers import tiny_tokenizer, words
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig

from analysis.metrics import (
    Metric,
    accuracy,
    answer_logit,
    answer_tokens,
    as_metric,
    kl,
    log_prob,
    logit_diff,
    prob,
    relative_prob,
)
from surgery.activations import run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
LOGITS = torch.randn(4, 9, 60, generator=torch.Generator().manual_seed(0))
LAST = torch.tensor([8, 3, 0, 5])
HERE = LOGITS[torch.arange(4), LAST]
P = HERE.softmax(-1)
ROWS = torch.arange(4)
REFERENCE = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))


def metrics():
    """Every metric for four examples, with its value at `HERE`."""
    y, other = ANSWERS.T
    q = REFERENCE.softmax(-1)
    return [
        (logit_diff(ANSWERS), HERE[ROWS, y] - HERE[ROWS, other]),
        (answer_logit(y), HERE[ROWS, y]),
        (prob(y), P[ROWS, y]),
        (log_prob(y), P[ROWS, y].log()),
        (relative_prob(y, torch.tensor([0.1, 0.2, 0.3, 0.4])), P[ROWS, y] / torch.tensor([0.1, 0.2, 0.3, 0.4]) - 1),
        (kl(REFERENCE), F.kl_div(P.log(), q, reduction="none").sum(-1)),
        (accuracy(HERE.argmax(-1) + torch.tensor([0, 1, 0, 0])), torch.tensor([1.0, 0.0, 1.0, 1.0])),
    ]


NAMES = [metric.name for metric, _ in metrics()]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_values(index):
    metric, wanted = metrics()[index]
    torch.testing.assert_close(metric.of_logits(LOGITS, LAST), wanted, rtol=0, atol=1e-6)
    # further axes in front, parts, other types
    picked = HERE if metric.tokens is None else HERE.gather(1, metric.tokens)
    torch.testing.assert_close(metric.value(picked.expand(5, 2, 4, -1)), wanted.expand(5, 2, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        metric.select([2, 0]).of_logits(LOGITS[[2, 0]], LAST[[2, 0]]), wanted[[2, 0]], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        metric.select(slice(1, 3)).of_logits(LOGITS[1:3], LAST[1:3]), wanted[1:3], rtol=0, atol=1e-6
    )
    assert metric.of_logits(LOGITS.bfloat16(), LAST).dtype == torch.float32
    assert metric.needs == ("answers" if index < 2 else "last") and metric.to("cpu").name == metric.name
    with pytest.raises(SurgeryError, match=f"The metric '{metric.name}' is made for 4 examples, and there are 3"):
        metric.check(3)
    metric.check(4)


def test_double_stays_double():
    for metric in (logit_diff(ANSWERS), prob(ANSWERS[:, 0])):
        assert metric.of_logits(LOGITS.double(), LAST).dtype == torch.float64


@pytest.mark.parametrize("index", range(len(NAMES) - 1), ids=NAMES[:-1])
def test_gradients(index):
    metric, _ = metrics()[index]
    logits = HERE[:, None].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: metric.of_logits(x, torch.zeros(4, dtype=torch.long)), logits, atol=1e-5)


def test_kl_of_itself_is_zero_and_infinite_logits_are_no_trouble():
    torch.testing.assert_close(kl(HERE).of_logits(LOGITS, LAST), torch.zeros(4), rtol=0, atol=1e-6)
    reference = HERE.clone()
    reference[:, :30] = -math.inf  # tokens that the reference rules out
    logits = LOGITS.clone()
    logits[..., :30] = -math.inf
    wanted = F.kl_div(HERE[:, 30:].log_softmax(-1), reference[:, 30:].softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(kl(reference).of_logits(logits, LAST), wanted, rtol=0, atol=1e-6)
    assert (kl(HERE).of_logits(logits, LAST) == math.inf).all()  # what the model rules out and the reference does not


@pytest.mark.parametrize("name", [*FAMILIES, "cohere"])
def test_from_the_last_norm(name):
    """Rows of the unembedding, with bias, scale and soft cap where a family has them: 2e-6 of logits of order one."""
    if name == "cohere":  # logits are scaled
        config = CohereConfig(**LLAMA_LIKE, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = build(name)
    logits, seen = run(model, CLEAN, ["final@-1"])
    last, final = torch.full((4,), 8), seen["final@-1"]
    y = ANSWERS[:, 0]
    with torch.no_grad():
        for metric in (logit_diff(ANSWERS), answer_logit(y), prob(y), log_prob(y), kl(logits[:, -1]), accuracy(y)):
            found = metric.of_final(torch.stack([final, final.flip(0)]), anatomy_of(model))
            torch.testing.assert_close(found[0], metric.of_logits(logits, last), rtol=0, atol=4e-6)
            torch.testing.assert_close(found[1], metric.of_logits(logits.flip(0), last), rtol=0, atol=4e-6)
    assert (anatomy_of(model).head.bias is not None) == (name in ("gptj", "phi"))


def test_a_head_that_somebody_hooks_is_called():
    model = build("llama_gqa")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    a = anatomy_of(model)
    logits, seen = run(model, CLEAN, ["final@-1"])
    found = logit_diff(ANSWERS).of_final(seen["final@-1"][None], a)[0]
    torch.testing.assert_close(found, logit_diff(ANSWERS).of_logits(logits, torch.full((4,), 8)), rtol=0, atol=1e-5)


# ---- the user's own


def test_a_function_of_all_logits():
    metric = as_metric(lambda logits: logits.logsumexp(-1).mean(1))
    assert metric.needs == "all" and as_metric(metric) is metric
    torch.testing.assert_close(metric.of_logits(LOGITS, LAST), LOGITS.logsumexp(-1).mean(1))
    own = Metric(
        "gap", lambda logits, weight: logits[..., 0] * weight, "answers", ANSWERS[:, :1], {"weight": torch.arange(4.0)}
    )
    wanted = HERE[ROWS, ANSWERS[:, 0]] * torch.arange(4)
    torch.testing.assert_close(own.of_logits(LOGITS, LAST), wanted)
    torch.testing.assert_close(own.select([3]).of_logits(LOGITS[[3]], LAST[[3]]), wanted[[3]])


@pytest.mark.parametrize(
    "function, got",
    [
        (lambda logits: logits.mean(), r"gave \(\)"),
        (lambda logits: logits[:, -1], r"gave \(4, 60\)"),
        (lambda logits: 1.0, "gave float"),
        (lambda logits: logits[:, 0, 0].tolist(), "gave list"),
    ],
)
def test_not_one_value_an_example(function, got):
    with pytest.raises(
        SurgeryError, match=rf"The metric '<lambda>' {got}, and one value an example, \(4,\), is needed"
    ):
        as_metric(function).of_logits(LOGITS, LAST)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: as_metric("logit_diff"), "A metric is a function of logits, and str is none"),
        (lambda: logit_diff(ANSWERS[:, 0]), r"needs two answers an example, \(batch, 2\), and not \(4,\)"),
        (lambda: logit_diff([[1, 2, 3]]), r"two answers an example, \(batch, 2\), and not \(1, 3\)"),
        (lambda: prob([1.0, 2.0]), "Answers are token ids, and these are torch.float32"),
        (lambda: answer_logit([True]), "Answers are token ids, and these are torch.bool"),
        (lambda: logit_diff([[" a", " b"]]), "(?s)Answers are token ids, and these are no numbers.*answer_tokens"),
        (lambda: log_prob([[1], [2, 3]]), "Answers are token ids, and these are no numbers, or not in rows"),
        (lambda: prob([3, -1]), "Answers are token ids, and -1 is none"),
        (lambda: logit_diff([[3, 60]] * 4).check(4, 60), "The answer 60 is no token: the model knows 0 to 59"),
        (lambda: accuracy([3, 4, 99, 5]).check(4, 60), "The answer 99 is no token"),
    ],
)
def test_what_is_no_metric(make, sentence):
    with pytest.raises(SurgeryError, match=sentence):
        make()


def test_answers_as_texts(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, words(20)))
    assert answer_tokens(tokenizer, ["w3", "w5"]).tolist() == tokenizer.convert_tokens_to_ids(["w3", "w5"])
    pairs = answer_tokens(tokenizer, [["w3", "w5"], ["w1", "w2"]])
    assert pairs.shape == (2, 2) and logit_diff(pairs).tokens.equal(pairs)
    with pytest.raises(SurgeryError, match="(?s)The answer 'w3 w4' is 2 tokens, and one is read.*first=True"):
        answer_tokens(tokenizer, ["w3 w4"])
    assert answer_tokens(tokenizer, ["w3 w4"], first=True).tolist() == tokenizer.convert_tokens_to_ids(["w3"])
    for first in (True, False):
        with pytest.raises(SurgeryError, match="The answer '' is 0 tokens"):
            answer_tokens(tokenizer, [""], first=first)
