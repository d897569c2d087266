"""Transfer Q*: the tokens of recomputing everything, a problem whose Q* is known, and what it counts."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint

from surgery.decoding import LocalGenerator, Sampling, draw, uniforms
from surgery.errors import SurgeryError
from surgery.logits.search.transfer import Indirect, TransferQ, normalised, released, transfer_q
from surgery.models import encoded_prompts, load

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20]]
SEEDS = [11, 12, 13]
GOLDEN = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Two tiny Llamas with strong opinions and many end tokens, and their tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("transfer")
    models = []
    for seed in (3, 4):
        tiny_checkpoint(folder / str(seed), seed=seed)
        model = AutoModelForCausalLM.from_pretrained(folder / str(seed)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(10)
        model.generation_config.eos_token_id = [1, 30, 31, 32, 33]
        models.append(model)
    return *models, AutoTokenizer.from_pretrained(folder / "3")


def reward(prompts, completions):
    """Some number of a text that looks at all of it."""
    texts = [f"{asked}|{said}" for asked, said in zip(prompts, completions, strict=True)]
    return [sum(ord(c) * (i + 1) for i, c in enumerate(text)) % 17 / 4 for text in texts]


def baseline(prompts, completions):
    return [len(text) % 5 / 2 for text in completions]


def recomputed(models, seed, prompt, *, alpha, k, lookahead, samples, ahead, indirect, new):
    """The algorithm in words, one row at a time and without a memory: tokens and their KL."""
    sft, rho, tokenizer = models
    ends = {1, 30, 31, 32, 33}

    def logits(model, ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].float()

    def text(ids):
        return tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, skip_special_tokens=True)

    asked, out, kls = tokenizer.decode(prompt, skip_special_tokens=True), [], []
    for t in range(new):
        lp = logits(sft, prompt + out).log_softmax(-1)
        scores = torch.full_like(lp, -math.inf)
        top = lp.topk(k).indices.tolist()
        noise = uniforms([seed + (t + 1) * GOLDEN], k * samples, max(1, lookahead))[0]
        for j, z in enumerate(top):
            texts = []
            for s in range(samples):
                written = [*out, z]
                for a in range(min(lookahead, new - t - 1)):
                    if written[-1] in ends:
                        break
                    step = logits(rho, prompt + written)[None]
                    u = torch.tensor(noise[j * samples + s, a : a + 1])
                    written.append(int(draw(step, u, Sampling(temperature=ahead))[0]))
                texts.append(text(written))
            r = np.array(reward([asked] * samples, texts))
            w = np.ones(samples)
            if indirect:
                w = np.exp((r - np.array(baseline([], texts))) / indirect)
            scores[z] = lp[z] + (w * r).sum() / w.sum() / alpha
        p = scores.softmax(-1)
        kls.append(sum(float(p[z] * (p[z].log() - lp[z])) for z in top if p[z] > 0))
        u = torch.tensor(uniforms([seed], 1, new)[0, 0, t : t + 1])
        out.append(int(draw(scores[None], u, Sampling())[0]))
        if out[-1] in ends:
            break
    return out, kls


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 4, "lookahead": 6, "samples": 1, "ahead": 0.0, "indirect": None},
        {"k": 5, "lookahead": 3, "samples": 1, "ahead": 1.0, "indirect": None},
        {"k": 3, "lookahead": 4, "samples": 3, "ahead": 0.7, "indirect": 0.8},
        {"k": 40, "lookahead": 0, "samples": 1, "ahead": 1.0, "indirect": None},
    ],
    ids=["greedy", "sampled", "indirect", "as-it-is"],
)
def test_tokens_of_recomputing_everything(family, settings):
    """Exact tokens, KL to 1e-4; the batch of all prompts with left padding, and groups of two."""
    indirect = None if settings["indirect"] is None else Indirect(baseline, settings["indirect"])
    decoder = TransferQ(
        *family[:2], reward, family[2], alpha=2.0, max_new_tokens=8, **settings | {"indirect": indirect}
    )
    found = decoder.decode(PROMPTS, 2, SEEDS)
    lengths = Counter()
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        tokens, kl = recomputed(family, seed, prompt, alpha=2.0, new=8, **settings)
        rollout = found.rollouts[2 * i]
        assert rollout.completion_ids == tokens and rollout.prompt_ids == prompt
        assert found.kl[2 * i] == pytest.approx(kl, abs=1e-4)
        assert rollout.truncated == (tokens[-1] not in {1, 30, 31, 32, 33})
        lengths[len(tokens)] += 1
    assert len({tuple(r.completion_ids) for r in found.rollouts}) > 3 and max(lengths) > 2


def test_a_row_does_not_depend_on_the_others(family):
    settings = {"alpha": 2.0, "k": 4, "lookahead": 4, "samples": 2, "max_new_tokens": 8}
    together = TransferQ(*family[:2], reward, family[2], **settings)(PROMPTS, 3, SEEDS)
    for batch_size in (1, 50):
        decoder = TransferQ(*family[:2], reward, family[2], **settings, batch_size=batch_size)
        assert [r.completion_ids for r in decoder(PROMPTS, 3, SEEDS)] == [r.completion_ids for r in together]
    for i, prompt in enumerate(PROMPTS):
        alone = TransferQ(*family[:2], reward, family[2], **settings)([prompt], 2, [SEEDS[i]])
        assert [r.completion_ids for r in alone] == [r.completion_ids for r in together[3 * i : 3 * i + 2]]


def test_a_large_alpha_is_plain_sampling_of_the_sft_model(family):
    sft, rho, tokenizer = family
    plain = LocalGenerator(sft, tokenizer, Sampling(8))(PROMPTS, 4, SEEDS)
    decoder = TransferQ(
        sft, rho, reward, tokenizer, alpha=1e9, k=40, lookahead=2, max_new_tokens=8, ends=(30, 31, 32, 33)
    )
    found = decoder.decode(PROMPTS, 4, SEEDS)
    assert [r.completion_ids for r in found.rollouts] == [r.completion_ids for r in plain]
    for a, b in zip(found.rollouts, plain, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4) and a.text == b.text
    assert max(abs(kl) for row in found.kl for kl in row) < 1e-5


def test_the_prompt_is_read_once_and_branches_from_memory(family):
    sft, rho, tokenizer = family
    calls = Counter()

    def counting(prompts, completions):
        calls["texts"] += len(completions)
        return reward(prompts, completions)

    decoder = TransferQ(sft, rho, counting, tokenizer, alpha=2.0, k=4, lookahead=3, samples=2, max_new_tokens=6)
    found = decoder.decode([PROMPTS[1]], 1, [SEEDS[1]])
    drawn = len(found.rollouts[0].completion_ids)
    assert drawn > 2
    assert found.sft_tokens == len(PROMPTS[1]) + drawn - 1
    # Each round: k tokens, and at most k * samples continuations of 3, whose last token nobody reads.
    assert len(PROMPTS[1]) + 4 * drawn < found.aligned_tokens <= len(PROMPTS[1]) + drawn * (4 + 4 * 2 * 2)
    assert found.reward_calls == calls["texts"] <= 8 * drawn
    alone = TransferQ(rho, rho, counting, tokenizer, alpha=2.0, k=4, lookahead=3, max_new_tokens=6)
    again = alone.decode([PROMPTS[1]], 1, [SEEDS[1]])
    assert again.sft_tokens == 0 and again.aligned_tokens > len(PROMPTS[1])
    other = TransferQ(rho, Copy(rho), counting, tokenizer, alpha=2.0, k=4, lookahead=3, max_new_tokens=6)
    apart = other.decode([PROMPTS[1]], 1, [SEEDS[1]])
    assert [r.completion_ids for r in apart.rollouts] == [r.completion_ids for r in again.rollouts]
    assert apart.sft_tokens == len(PROMPTS[1]) + len(apart.rollouts[0].completion_ids) - 1


class Copy:
    """The same model as another decoder."""

    def __init__(self, model):
        from surgery.decoding import CausalDecoder

        self.inner = CausalDecoder(model)
        self.models, self.context = self.inner.models, self.inner.context

    def prefill(self, ids, mask):
        return self.inner.prefill(ids, mask)

    def step(self, tokens, state):
        return self.inner.step(tokens, state)


# ---- a problem whose Q* is known

TABLE = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.25, 0.25, 0.5]])
"""p(next | last) of the SFT model over three tokens."""
WORTH = {word: (7 * i + 5) % 27 for i, word in enumerate(product((0, 1, 2), repeat=3))}
WORDS = {"k": 3, "lookahead": 8, "max_new_tokens": 3}


class Seen:
    """What has been read, as the state of a decoder by table."""

    def __init__(self, rows):
        self.rows = rows

    def repeat(self, times):
        return Seen([row for row in self.rows for _ in range(times)])

    def select(self, rows):
        return Seen([self.rows[i] for i in rows.tolist()])


class Tabular:
    """Next-token probabilities as a function of everything read."""

    models = ()
    context = None

    def __init__(self, chances):
        self.chances = chances

    def prefill(self, ids, mask):
        return self._said(Seen([tuple(row[keep > 0].tolist()) for row, keep in zip(ids, mask, strict=True)]))

    def step(self, tokens, state):
        return self._said(Seen([(*row, token) for row, token in zip(state.rows, tokens.tolist(), strict=True)]))

    def _said(self, state):
        return torch.stack([self.chances(row) for row in state.rows]).log(), state


class Digits:
    """A tokenizer whose token i is the digit i."""

    bos_token_id = eos_token_id = None

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(map(str, row)) for row in rows]


def worth(prompts, completions):
    return [WORTH[tuple(map(int, text))] / 13 for text in completions]


def best(written):
    """Q*(written): the worth of the best word that begins so."""
    return max(value for word, value in WORTH.items() if word[: len(written)] == written) / 13


def sft(row):
    return TABLE[row[-1]]


def optimal(row):
    """A policy that only makes the best word out of what is there: what the reward's optimum is without a KL."""
    values = torch.tensor([best((*row[1:], z)) if len(row) <= 3 else 0.0 for z in range(3)])
    return torch.nn.functional.one_hot(values.argmax(), 3).float()


def test_where_q_star_is_known():
    """Frequencies are those of prod softmax(log p + Q*/alpha): chi-square of 26 degrees of freedom below its 0.999
    quantile. The KL is that of the exact distribution within four standard errors."""
    alpha, n = 0.7, 2000
    decoder = TransferQ(Tabular(sft), Tabular(optimal), worth, Digits(), alpha=alpha, **WORDS)
    found = decoder.decode([[0]], n, [7])
    counts = Counter(tuple(r.completion_ids) for r in found.rollouts)
    chances, plain = {}, {}
    for word in WORTH:
        p = q = 1.0
        for t, token in enumerate(word):
            before = TABLE[word[t - 1] if t else 0]
            each = (before.log() + torch.tensor([best((*word[:t], z)) for z in range(3)]) / alpha).softmax(-1)
            p, q = p * float(each[token]), q * float(before[token])
        chances[word], plain[word] = p, q
    assert sum(chances.values()) == pytest.approx(1, abs=1e-6)
    common = {word for word in WORTH if n * chances[word] >= 5}
    rest = n * sum(p for word, p in chances.items() if word not in common)
    square = sum((counts[w] - n * chances[w]) ** 2 / (n * chances[w]) for w in common)
    square += (sum(c for w, c in counts.items() if w not in common) - rest) ** 2 / rest if rest else 0
    assert square < 54.05
    exact = sum(p * math.log(p / plain[word]) for word, p in chances.items())
    sums = [sum(kl) for kl in found.kl]
    assert abs(np.mean(sums) - exact) < 4 * np.std(sums) / n**0.5
    gained = np.mean(worth([], ["".join(map(str, r.completion_ids)) for r in found.rollouts]))
    assert gained > sum(q * WORTH[w] / 13 for w, q in plain.items()) + 0.3


def test_a_small_alpha_and_an_aligned_model_find_the_best_word():
    decoder = TransferQ(Tabular(sft), Tabular(optimal), worth, Digits(), alpha=1e-3, **WORDS)
    word = max(WORTH, key=WORTH.get)
    assert all(tuple(r.completion_ids) == word for r in decoder([[0], [1]], 2, [0, 1]))


def test_greedy_choice_and_its_kl():
    settings = WORDS | {"k": 2, "temperature": 0}
    decoder = TransferQ(Tabular(sft), Tabular(optimal), worth, Digits(), alpha=1e9, **settings)
    found = decoder.decode([[0]], 2, [0])
    assert [r.completion_ids for r in found.rollouts] == [[1, 0, 1]] * 2
    assert found.kl[0] == pytest.approx([-math.log(0.6), -math.log(0.5), -math.log(0.6)], abs=1e-6)


def test_re_weighting_turns_one_alignment_into_another():
    """rho_BL ~ p exp(r_BL / beta), re-weighted by exp((r - r_BL) / beta), has the mean reward of p exp(r / beta)."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(6, generator=generator).softmax(-1)
    r, r_bl = (torch.randn(6, generator=generator) for _ in range(2))
    beta = 0.9
    rho = (p.log() + r_bl / beta).softmax(-1)
    drawn = torch.multinomial(rho, 200_000, replacement=True, generator=generator)
    target = float(((p.log() + r / beta).softmax(-1) * r).sum())
    assert float(normalised(r[drawn], r_bl[drawn], beta)) == pytest.approx(target, abs=0.02)
    assert float(r[drawn].mean()) != pytest.approx(target, abs=0.1), "without weights it is another number"
    two = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    assert float(released(*two, 2.0)) == pytest.approx((math.exp(0.5) + 3 * math.e) / 2, rel=1e-6)


def test_on_a_real_pair_the_reward_rises():
    """tiny-sums-sft towards sums worked out, its Q from tiny-sums-grpo: every answer has the form asked for."""
    (model, tokenizer), (aligned, _) = load("tiny-sums-sft"), load("tiny-sums-grpo")
    prompts = encoded_prompts(tokenizer, ["m 1+2+3=", "m 7-2+4+4=", "m 3-9+5="])

    def worked_out(prompts, completions):
        steps = [prompt.count("+") + prompt.count("-") for prompt in prompts]
        return [float(text.count(";") == n) for text, n in zip(completions, steps, strict=True)]

    asked = [text for text in ("m 1+2+3=", "m 7-2+4+4=", "m 3-9+5=") for _ in range(4)]
    more = {"group": 4, "max_new_tokens": 32}
    plain = transfer_q(model, aligned, worked_out, prompts, tokenizer, alpha=1e6, k=45, lookahead=0, **more)
    found = transfer_q(model, aligned, worked_out, prompts, tokenizer, alpha=0.1, k=4, **more)
    before, after = (np.mean(worked_out(asked, [r.text for r in one.rollouts])) for one in (plain, found))
    assert before < 0.9 and after == 1.0
    assert np.mean([sum(kl) for kl in found.kl]) > 0.3 and abs(np.mean([sum(kl) for kl in plain.kl])) < 1e-4


# ---- wrong input


def test_settings_out_of_bounds(family):
    with pytest.raises(SurgeryError, match="alpha is 0"):
        TransferQ(*family[:2], reward, family[2], alpha=0)
    with pytest.raises(SurgeryError, match="k is 0"):
        TransferQ(*family[:2], reward, family[2], alpha=1, k=0)
    with pytest.raises(SurgeryError, match="2 greedy continuations"):
        TransferQ(*family[:2], reward, family[2], alpha=1, samples=2, ahead=0)
    with pytest.raises(SurgeryError, match="one continuation changes nothing"):
        TransferQ(*family[:2], reward, family[2], alpha=1, indirect=Indirect(baseline))
    TransferQ(*family[:2], reward, family[2], alpha=1, indirect=Indirect(baseline, estimate=released))
    with pytest.raises(SurgeryError, match="beta is -1"):
        Indirect(baseline, -1)
    decoder = TransferQ(*family[:2], reward, family[2], alpha=1, max_new_tokens=8)
    with pytest.raises(SurgeryError, match="one seed a prompt"):
        decoder([[3]], 1, [])
    with pytest.raises(SurgeryError, match="don't fit into the context of 64"):
        decoder([[3] * 60], 1, [0])


def test_rewards_that_are_no_numbers_and_other_vocabularies(family, tmp_path):
    from transformers import AutoModelForCausalLM

    sft, rho, tokenizer = family
    rho.train()
    try:
        with pytest.raises(SurgeryError, match="one finite number each"):
            TransferQ(sft, rho, lambda p, c: [math.nan] * len(c), tokenizer, alpha=1, max_new_tokens=2)([[3]], 1, [0])
        with pytest.raises(SurgeryError, match="one finite number each"):
            TransferQ(sft, rho, lambda p, c: [None] * len(c), tokenizer, alpha=1, max_new_tokens=2)([[3]], 1, [0])
        assert all(module.training for module in rho.modules()), "left as it was"
    finally:
        rho.eval()
    other = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path / "other", vocab=48))
    with pytest.raises(SurgeryError, match="40 tokens and the aligned model 48"):
        TransferQ(sft, other, reward, tokenizer, alpha=1, max_new_tokens=2)([[3]], 1, [0])
