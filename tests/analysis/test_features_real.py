"""On SmolLM2: examples and effects of latents of a real tokenizer and a real stream."""

import numpy as np
import pytest
import torch

from analysis.features import Reader, ablate_latents, attribute_latents, examples, promoted
from analysis.metrics import answer_tokens, log_prob
from surgery.models import load
from surgery.sae.activations import Shuffled, Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import TopK
from surgery.sae.train import Entry, Settings, fit

SITE = "resid_post.12"
TEXTS = ["The capital of France is Paris, and the capital of Italy is Rome.",
         "Café and naïve are words with accents; 你好 means hello.",
         "In Paris, people drink coffee. In Rome, people drink coffee too.",
         "She sells sea shells by the sea shore, and he sells shells too.",
         "The quick brown fox jumps over the lazy dog, again and again.",
         "One plus one is two, and two plus two is four, is it not?"]  # fmt: skip


@pytest.mark.real
def test_examples_and_effects_on_smollm2():
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2", "float32")
    dictionary = Dictionary(576, 256, TopK(k=8))
    reader = Reader(dictionary, model, SITE, tokenizer)
    rows = list(Stream(model, [SITE], list(reader.batches(TEXTS))))
    fit({"one": Entry(SITE, dictionary, Settings(lr=3e-3))}, Shuffled(rows * 120, size=512, batch=64), steps=120)

    found = examples(reader, TEXTS, k=3)
    strong = [int(j) for j in np.argsort(-found.sums)[:8]]
    frame = found.to_dataframe()
    assert frame["context"].str.contains("你好").any() and not frame["context"].str.contains("�").any()
    for latent in strong:
        values = [e.value for e in found.of(latent)]
        assert values == sorted(values, reverse=True) and values[0] == pytest.approx(found.largest[latent])

    prompts = ["The capital of France is", "The capital of Italy is"]
    metric = log_prob(answer_tokens(tokenizer, [" Paris", " Rome"]))
    first = attribute_latents(reader, prompts, metric)
    best = [j for j, _ in first.top(8, absolute=True)]
    exact = ablate_latents(reader, prompts, metric, best)
    assert np.abs(exact.mean).max() > 0.01
    small = np.abs(first.select("latent", best).values) < 1.0
    signs = np.sign(first.select("latent", best).values) == np.sign(exact.values)
    assert signs[small].mean() > 0.7
    (up, down), *_ = promoted(model, reader.decoder()[best[:1]], 5, tokenizer)
    assert len(up) == len(down) == 5 and up[0][1] > 0 > down[0][1]
