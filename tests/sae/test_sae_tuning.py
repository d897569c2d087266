"""SAE-tuning: the loss is the published one, gradients go where they may, and what is left is an ordinary model."""

import copy

import pytest
import torch
from activations.families import build
from torch import nn

from surgery import zoo
from surgery.activations import edit
from surgery.errors import SurgeryError
from surgery.models import Batch, encode, load
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import BatchTopK, TopK
from surgery.sae.stand_in import Noise, stand_in
from surgery.sae.text import Reading, Text
from surgery.sae.tune import Adapter, divergence, labels_of, transplanted, tune
from surgery.training.data import rows_of
from surgery.tuning.decomposed import export
from surgery.weights.vector import TaskVector

torch.set_num_threads(1)
TEXTS = ["m 1+1=#2", "m 22+21=#3", "c abc=#abc", "m 3+14-2=#5"]
SMALL = Adapter(rank=4, alpha=16.0, dropout=0.0)
QUICK = {"adapter": SMALL, "lr": 1e-3, "epochs": 1}


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-base")


@pytest.fixture(scope="module")
def batches(tiny):
    return [encode(tiny[1], TEXTS), encode(tiny[1], TEXTS[::-1], side="left"), encode(tiny[1], TEXTS[:2])]


def of(width=96, seed=0, latents=200, rule=None):
    """A dictionary that is neither perfect nor nonsense: many codes, an error of the size of the rows."""
    return Dictionary(width, latents, rule or TopK(k=64), norm=0.6, seed=seed)


def moved(before, after):
    """Layers whose weights differ by a bit."""
    a, b = before.state_dict(), after.state_dict()
    assert a.keys() == b.keys()
    return {int(n.split("layers.")[1].split(".")[0]) for n in a if "layers." in n and not torch.equal(a[n], b[n])}


def logged(*args, **words):
    lines = []
    return tune(*args, **words, on_step=lambda step, line: lines.append(line)), lines


# ---- the loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_loss_is_the_published_one_and_padding_is_no_part_of_it(tiny, side):
    """`batchmean` of a batch: summed over tokens and vocabulary, over its rows; at B = 0 the student is the target."""
    model, dictionary = tiny[0], of()
    total = 0.0
    for text in TEXTS:  # one by one, without padding
        row = encode(tiny[1], [text])
        with torch.no_grad():
            p = model(row.ids).logits.log_softmax(-1)
            with edit(model, {"resid_post.1": lambda x: dictionary(x)}):
                q = model(row.ids).logits.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    _, lines = logged(model, dictionary, "resid_post.1", [encode(tiny[1], TEXTS, side=side)], **QUICK)
    assert total / 4 > 1
    assert lines[0]["kl"] == pytest.approx(total / 4, rel=1e-4) and lines[0]["loss"] == lines[0]["kl"]
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    published = nn.functional.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="batchmean")
    assert float(divergence(a, b) / 5) == pytest.approx(float(published), rel=1e-5)


def test_a_divergence_in_parts_is_the_same(monkeypatch):
    a, b = torch.randn(11, 7), torch.randn(11, 7, requires_grad=True)
    whole = divergence(a, b)
    (wanted,) = torch.autograd.grad(whole, b)
    monkeypatch.setattr("surgery.sae.tune.AT_ONCE", 21)  # three tokens at a time
    parts = divergence(a, b)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, b)[0], wanted)


def test_labels_are_learned_where_they_are_given(tiny):
    model, batch = tiny[0], encode(tiny[1], TEXTS, side="left")
    labels = batch.ids.masked_fill(~batch.mask | (batch.positions == 0), -100)  # nothing real stands before the first
    with torch.no_grad():
        wanted = model(**batch.inputs(model), labels=labels).loss * (labels[:, 1:] != -100).sum() / 4
    lines = logged(model, None, None, [batch], labels=1.0, **QUICK)[1]
    assert lines[0]["ce"] == pytest.approx(float(wanted), rel=1e-4) and set(lines[0]) == {"loss", "ce", "grad_norm"}
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": torch.full_like(batch.ids, -100)}
    given["labels"][:, -1] = batch.ids[:, -1]
    assert (labels_of(given, batch) != -100).sum() == 4
    counted = next(iter(Text(rows_of([{"prompt": "m 1+1=", "completion": "#2"}]), tiny[1],
                             Reading(packing=False, batch=1, positions="completion", held_out=2))))  # fmt: skip
    assert (labels_of(counted, counted) != -100).sum() == 3  # "#", "2" and the end mark


def test_a_mixture_is_one_of_both_losses(tiny, batches):
    teacher = load("tiny-chain")[0]
    lines = logged(tiny[0], of(), "resid_post.1", batches[:1], teacher=teacher, labels=0.25, **QUICK)[1]
    assert lines[0]["loss"] == pytest.approx(0.75 * lines[0]["kl"] + 0.25 * lines[0]["ce"], rel=1e-5)


def test_another_teacher_is_followed(tiny, batches):
    """Distillation without a dictionary: the first loss is the models' divergence, and it falls."""
    teacher, batch = load("tiny-sums-grpo")[0], batches[0]
    with torch.no_grad():
        wanted = [m(**batch.inputs(m)).logits[batch.mask] for m in (teacher, tiny[0])]
    tuned, lines = logged(tiny[0], None, None, [batch] * 20, teacher=teacher, **QUICK)
    assert lines[0]["kl"] == pytest.approx(float(divergence(*wanted)) / 4, rel=1e-4)
    assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
    assert moved(tiny[0], tuned) == {0, 1, 2, 3}


# ---- where gradients go


@pytest.mark.parametrize(("gradient", "layers"), [("none", {2, 3}), ("straight", {0, 1, 2, 3}),
                                                  ("through", {0, 1, 2, 3})])  # fmt: skip
def test_only_what_lies_above_the_site_learns_unless_a_gradient_goes_through(tiny, batches, gradient, layers):
    tuned = tune(tiny[0], of(), "resid_post.1", batches, gradient=gradient, **QUICK)
    assert moved(tiny[0], tuned) == layers


def test_gradients_are_straight_or_the_dictionarys_own():
    dictionary, x = of(8, latents=20, rule=TopK(k=3)), torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(5, 8)
    found = {}
    for gradient in ("straight", "through"):
        y = stand_in(dictionary, gradient)(x)
        torch.testing.assert_close(y, dictionary(x))
        (found[gradient],) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(found["straight"], weight)
    (own,) = torch.autograd.grad((dictionary(x) * weight).sum(), x)
    torch.testing.assert_close(found["through"], own)
    assert not stand_in(dictionary)(x).requires_grad


def test_the_loss_falls(tiny, batches):
    lines = logged(tiny[0], of(), "resid_post.1", batches[:1] * 40, **QUICK)[1]
    assert lines[-1]["kl"] < 0.6 * lines[0]["kl"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_other_families(family):
    """Layers that give tuples, parallel blocks, fused projections: the same rules hold."""
    model, dictionary = build(family), of(32, latents=64, rule=TopK(k=16))
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tuned, lines = logged(model, dictionary, "resid_post.1", [ids], **QUICK)
    with torch.no_grad():
        p = model(ids).logits
        with edit(model, {"resid_post.1": stand_in(dictionary)}):
            q = model(ids).logits
    assert lines[0]["kl"] == pytest.approx(float(divergence(p.flatten(0, 1), q.flatten(0, 1))) / 3, rel=1e-4)
    changed = [n for n, t in tuned.state_dict().items() if not torch.equal(t, before[n])]
    assert changed and all(".2." in name for name in changed)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# ---- what is left


def test_an_ordinary_model_is_left_and_the_target_is_as_it_was(tiny, batches, tmp_path):
    model = copy.deepcopy(tiny[0]).train()
    dictionary = of().train()
    before, names = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    attributes = set(vars(model))
    tuned = tune(model, dictionary, "resid_post.1", batches, **QUICK)
    assert [n for n, _ in tuned.named_modules()] == names and [n for n, _ in model.named_modules()] == names
    assert set(vars(model)) == attributes == set(vars(tuned))
    assert model.training and not tuned.training and dictionary.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for m in (model, tuned, dictionary) for p in m.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for one in (model, tuned) for m in one.modules())
    tuned.save_pretrained(tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "adapter_config.json").exists()
    tiny[1].save_pretrained(tmp_path / "tuned")
    again = load(tmp_path / "tuned")[0]
    with torch.no_grad():
        torch.testing.assert_close(again(batches[2].ids).logits, tuned(batches[2].ids).logits)


def test_a_run_depends_on_its_seed_alone(tiny, batches):
    words = {**QUICK, "adapter": Adapter(4, 16.0, dropout=0.5)}
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        drawn = torch.get_rng_state()
        states.append(tune(tiny[0], of(), "resid_post.1", batches, seed=seed, **words).state_dict())
        assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert not all(torch.equal(t, states[2][n]) for n, t in states[0].items())
    still = tune(tiny[0], of(), "resid_post.1", batches, **QUICK).state_dict()  # the same start without dropout
    assert not all(torch.equal(t, still[n]) for n, t in states[0].items())


@pytest.mark.parametrize("stand", [of, lambda: Noise(of(), seed=3)], ids=["dictionary", "noise"])
def test_checkpointing_computes_the_same(tiny, batches, stand):
    words = {**QUICK, "adapter": Adapter(4, 16.0, dropout=0.2), "gradient": "straight"}
    model = copy.deepcopy(tiny[0])
    plain, one = logged(model, stand(), "resid_post.1", batches, **words)
    again, other = logged(model, stand(), "resid_post.1", batches, gradient_checkpointing=True, **words)
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_of_checkpointing_stays(tiny, batches, keep):
    """Neither in the target nor in what is given back: flags, hooks, and a dropout that was set to 0 meanwhile."""
    model = copy.deepcopy(tiny[0])
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    hooks = len(model.get_input_embeddings()._forward_hooks)
    tuned = tune(model, of(), "resid_post.1", batches, gradient_checkpointing=True, keep=keep, **QUICK)
    for each in (model, tuned):
        assert not any(getattr(m, "gradient_checkpointing", False) or m.training for m in each.modules())
        assert {m.attention_dropout for m in each.modules() if hasattr(m, "attention_dropout")} == {0.1}
        assert len(each.get_input_embeddings()._forward_hooks) == hooks


def test_an_adapter_that_is_kept_is_the_same_change(tiny, batches, tmp_path):
    merged = tune(tiny[0], of(), "resid_post.1", batches, **QUICK)
    model = copy.deepcopy(tiny[0])
    kept = tune(model, of(), "resid_post.1", batches, keep=True, **QUICK)
    assert {n for n, p in kept.named_parameters() if p.requires_grad} == {
        n for n, _ in kept.named_parameters() if "lora_" in n
    }
    with torch.no_grad():
        torch.testing.assert_close(kept(batches[2].ids).logits, merged(batches[2].ids).logits, rtol=1e-4, atol=1e-4)
    vector = TaskVector.from_adapter(zoo.get("tiny-base"), export(kept, tmp_path / "adapter"))
    change = TaskVector.between(tiny[0], merged)
    name = "model.layers.3.mlp.down_proj.weight"
    torch.testing.assert_close(vector.tensor(name), change.tensor(name), rtol=1e-3, atol=1e-6)
    assert torch.linalg.matrix_rank(vector.tensor(name)) == SMALL.rank


def test_the_change_is_added_to_a_sibling(tiny, batches):
    sibling = load("tiny-shift")[0]
    tuned = tune(tiny[0], of(), "resid_post.1", batches, **QUICK)
    before = copy.deepcopy(sibling.state_dict())
    found = transplanted(tiny[0], tuned, sibling, scale=0.5)
    a, b, c, d = (m.state_dict() if hasattr(m, "state_dict") else m for m in (tiny[0], tuned, before, found))
    for name in a:
        torch.testing.assert_close(d[name], c[name] + 0.5 * (b[name] - a[name]), rtol=1e-5, atol=1e-6)
        assert torch.equal(sibling.state_dict()[name], c[name])


# ---- types, generation, noise


def test_a_target_in_bfloat16_keeps_its_type_and_the_dictionary_stays_in_float32(tiny, batches):
    model, seen = copy.deepcopy(tiny[0]).bfloat16(), []

    class Spy(Dictionary):
        def forward(self, x):
            seen.append((x.dtype, self.decoder.dtype))
            return super().forward(x)

    tuned, lines = logged(model, Spy(96, 200, TopK(k=64), norm=0.6).bfloat16(), "resid_post.1", batches, **QUICK)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}
    assert all(0 < line["kl"] < 1e4 for line in lines) and moved(model, tuned) == {2, 3}


@pytest.mark.parametrize("rule", [TopK(k=64), BatchTopK(k=64.0)], ids=["topk", "batchtopk"])
def test_generation_with_the_dictionary_in_place(tiny, rule):
    """Token by token from the cache, or over again from the start, and with padding or none: the same tokens."""
    model, tokenizer = tiny
    dictionary = of(rule=rule)
    if isinstance(rule, BatchTopK):
        dictionary.threshold.fill_(0.05)
    prompts = ["m 3+14-2=", "c abcd=", "m 1+1="]
    batch = encode(tokenizer, prompts, side="left")
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with edit(model, {"resid_post.1": stand_in(dictionary)}):
        together = model.generate(**batch.inputs(model), **words)
        plain = model.generate(**batch.inputs(model), **words, use_cache=False)
    assert torch.equal(together, plain)
    assert not torch.equal(together, model.generate(**batch.inputs(model), **words))
    for row, prompt in zip(together, prompts, strict=True):
        one = encode(tokenizer, [prompt])
        with edit(model, {"resid_post.1": stand_in(dictionary)}):
            alone = model.generate(**one.inputs(model), **words)[0, one.ids.shape[1] :]
        assert torch.equal(row[batch.ids.shape[1] :][: len(alone)], alone)


def test_noise_is_as_long_as_the_error_and_the_same_when_asked_again():
    dictionary, rows = of(8, latents=20, rule=TopK(k=3)), torch.randn(50, 8)
    noise = Noise(dictionary, seed=1)
    moved_by = noise(rows, 4) - rows
    torch.testing.assert_close(moved_by.norm(dim=1), (dictionary(rows) - rows).norm(dim=1))
    assert torch.equal(noise(rows, 4), noise(rows, 4)) and not torch.equal(noise(rows, 4), noise(rows, 5))
    cosines = torch.cosine_similarity(moved_by, dictionary(rows) - rows, dim=1)
    assert cosines.abs().mean() < 0.5


# ---- what is refused


def nan():
    dictionary = of()
    with torch.no_grad():
        dictionary.b_dec[3] = float("nan")
    return dictionary


@pytest.mark.parametrize(("words", "told"), [
    ({"dictionary": of(64)}, "The dictionary reads 64 numbers and gives 64; 'resid_post.1' of the target has 96."),
    ({"site": "resid_post.9"}, "resid_post.9"),
    ({"site": "resid_post"}, "is 4 places"),
    ({"site": None}, "needs a site"),
    ({"site": "resid_post.3"}, "Nothing can learn: no adapter lies above 'resid_post.3'"),
    ({"dictionary": None}, "its own teacher already"),
    ({"dictionary": nan()}, "Step 1: the loss is not finite."),
    ({"labels": 1.5}, "from 0 to 1, found 1.5"),
    ({"gradient": "thru"}, "There is no gradient 'thru'."),
    ({"batches": []}, "There are no batches to tune on."),
    ({"batches": iter([]), "epochs": 2}, "can be read once"),
    ({"teacher": "tiny-boxes-wide"}, "The target's vocabulary has 45 tokens and the teacher's 60."),
])  # fmt: skip
def test_errors_are_sentences_and_leave_the_target_alone(tiny, batches, words, told):
    model = tiny[0]
    before, names = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    given = {"dictionary": of(), "site": "resid_post.1", "batches": batches} | words
    if "teacher" in given:
        given["teacher"] = build("llama")
    with pytest.raises(SurgeryError, match=told.replace("(", r"\(")):
        tune(model, given.pop("dictionary"), given.pop("site"), given.pop("batches"), **{**QUICK, **given})
    assert [n for n, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_stop_between_steps_leaves_the_target_alone(tiny, batches):
    def stop(step, line):
        raise KeyboardInterrupt

    names = [n for n, _ in tiny[0].named_modules()]
    with pytest.raises(KeyboardInterrupt):
        tune(tiny[0], of(), "resid_post.1", batches, **QUICK, on_step=stop)
    assert [n for n, _ in tiny[0].named_modules()] == names


def test_endless_text_needs_a_number_of_steps(tiny):
    text = Text(rows_of({"task": "direct"}), tiny[1], Reading(packing=False, batch=4))
    with pytest.raises(SurgeryError, match="without end"):
        tune(tiny[0], of(), "resid_post.1", text, **QUICK)
    assert len(logged(tiny[0], of(), "resid_post.1", text, steps=3, **QUICK)[1]) == 3


@pytest.mark.real
def test_smollm2():
    """Two steps of a real model behind a dictionary that rebuilds nothing well: only the layers above move."""
    model, tokenizer = load("smollm2", dtype="float32")
    dictionary = Dictionary(576, 1024, TopK(k=256), norm=1.0)
    batch = encode(tokenizer, ["The sea is wide and blue.", "Two and two are four."], side="left")
    tuned, lines = logged(model, dictionary, "resid_post.27", [batch], lr=1e-4, adapter=Adapter(), epochs=2)
    assert moved(model, tuned) == {28, 29} and lines[1]["kl"] < lines[0]["kl"]
    assert isinstance(batch, Batch) and not hasattr(tuned, "peft_config")
