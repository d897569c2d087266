"""The benchmark of decoding: every section runs on the tiny family and says what it measured; no tensor is large."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from surgery.decoding import Sampling
from surgery.logits import Ensemble, generate, member, speculate

torch.set_num_threads(1)
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmarks"))
    return __import__


def wide(seed, vocab=2000):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, initializer_range=0.4, eos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def words(vocab):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    )


def test_no_tensor_of_prompts_by_tokens_by_vocabulary_is_ever_made(module):
    largest, rows, length, vocab = module("logits_memory").largest, 4, 40, 2000
    tokenizer = words(vocab)
    large, tuned, small = (member(wide(i), tokenizer, name=str(i)) for i in range(3))
    ensemble = (large + (tuned - small)).filtered("plausible", 0.1)
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    prompts = [*ids[:-1].tolist(), ids[-1, :7].tolist()]  # one is padded
    generate(ensemble, prompts[:1], sampling=Sampling(1))  # making decoders tries models out
    model = large.base.model

    def numbers(work):
        return math.prod(largest(work))

    whole = numbers(lambda: model(ids))
    assert whole == rows * length * vocab
    for sampling in (Sampling(5, temperature=0.0), Sampling(5, top_p=0.9, temperature=0.7)):
        words_of = {"sampling": sampling, "members": True}
        assert numbers(partial(generate, ensemble, prompts, **words_of)) <= 3 * rows * vocab
        found = numbers(partial(speculate, ensemble, prompts, draft=tuned, k=3, adaptive=False, **words_of))
        assert found <= 3 * (3 + 1) * vocab
    assert 3 * rows * vocab < whole / 10


def test_sections_on_the_tiny_family(module, tmp_path, capsys):
    logits, models = module("logits"), module("logits_models")
    subject = models.case(models.TINY)
    single, three = logits.single(subject, 2, 6, 1), logits.three(subject, 2, 6, 2)
    seconds = single["seconds"]
    assert single["same_tokens"] and single["ratio"] == seconds["transformers"][0] / seconds["ours"][0]
    assert single["tokens_per_s"]["ours"] == 12 / seconds["ours"][0]
    each = three["seconds"]
    rounds = [each["three"][i] / (each["large"][i] + each["tuned"][i] + each["small"][i]) for i in range(2)]
    assert three["ratio"] == pytest.approx(sum(rounds) / 2) and three["range"] == pytest.approx(sorted(rounds))
    assert 0 < three["combination"] < 1 and Ensemble._scores.__name__ == "_scores"
    whole, some = logits.recompute(subject, 12, 1, None), logits.recompute(subject, 12, 1, 4)
    assert whole["timed_steps"] == 12 and some["timed_steps"] == 4
    assert whole["same_tokens"] == some["same_tokens"] == 1
    talking = models.case(models.TINY, ends=True)
    talking.prompts = talking.prompts[:3]
    spoken = logits.speculation(talking, 36, 1)
    assert set(spoken["same_tokens"].values()) == {1.0} and spoken["draft"] == "tuned"
    assert spoken["times_plain"]["plain"]["ratio"] == spoken["times_large"]["large alone"]["ratio"] == 1
    report = spoken["reports"]["k = 3"]
    assert 0 < report["accept_rate"] < 1 and 1 < report["tokens_per_round"] <= 4
    assert spoken["tokens"]["floor"] == spoken["tokens"]["plain"] < 3 * 36, "texts end where they end"
    path = tmp_path / "logits.json"
    results = {"single": [single], "three": [three], "recompute": [whole], "speculation": [spoken]}
    path.write_text(json.dumps({"results": results}))
    logits.main(["--tables", "--json", str(path)])
    printed = capsys.readouterr().out
    assert printed.strip() == logits.tables(results)
    assert f"| {single['ratio']:.2f} (" in printed and f"| {100 * report['accept_rate']:.0f} % |" in printed


def test_memory_of_the_tiny_family(module):
    models = module("logits_models")
    row = module("logits_memory").measured(models.case(models.TINY))
    parameters = {"tiny-base": 447_552, "tiny-small-chain": 163_072, "tiny-small-base": 163_072}
    assert row["weights"] == pytest.approx(4 * sum(parameters.values()) / 2**20)
    large = models.case(models.TINY).large.base.model.config
    size = large.hidden_size // large.num_attention_heads
    assert module("logits_memory").per_token(models.case(models.TINY).large.base.model) == (
        2 * 4 * large.num_hidden_layers * large.num_key_value_heads * size
    )
    assert row["largest"][-1] != 45 or math.prod(row["largest"]) <= row["rows"] * 45


def test_steps_that_were_not_timed_lie_between_those_that_were(module):
    between = module("logits").between
    line = [1.0 + 0.5 * t for t in range(20)]
    where = [0, 7, 8, 19]
    assert between(where, [line[t] for t in where], 20) == pytest.approx(sum(line))
    assert between(range(4), [1, 2, 4, 1], 4) == 8


def test_agreement_is_the_share_before_texts_part(module):
    assert module("logits").agreement([[1, 2, 3], [4]], [[1, 5, 3], [4, 4]]) == 0.5


def test_a_cut_keeps_the_layers_it_is_told_to_and_learns_from_the_whole(module):
    models, model = module("logits_models"), wide(1, vocab=40)
    ids, batch = torch.tensor([[1, 2, 3, 4]]), [([1, 2], [3, 4, 5]), ([6], [7, 8])]
    whole, first = models.cut(model, [0, 1]), models.cut(model, [1])
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, model(ids).logits)
        assert first.config.num_hidden_layers == 1 and model.config.num_hidden_layers == 2
        once, twice = first(ids), first(ids[:, :3])
        assert torch.allclose(once.logits[:, :3], twice.logits, atol=1e-5)
        assert float(models.divergence(model, whole, batch)) == pytest.approx(0, abs=1e-6)
        a, b = (m(torch.tensor([[1, 2, 3, 4, 5]])).logits[0, 1:4].log_softmax(-1) for m in (model, first))
        c, d = (m(torch.tensor([[6, 7, 8]])).logits[0, :2].log_softmax(-1) for m in (model, first))
        by_hand = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in ((a, b), (c, d))]).mean()
        assert float(models.divergence(model, first, batch)) == pytest.approx(float(by_hand), rel=1e-4)
    before = copy.deepcopy(model.state_dict())
    losses = models.distil(model, first, batch * 4, 30, 2, 0.02, 0)
    assert losses[-1] < 0.5 * losses[0] and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
