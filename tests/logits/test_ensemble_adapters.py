"""Two PEFT adapters of one model, and the model without them, as members: they say what models loaded apart say."""

import copy

import pytest
import torch
from llamas import PROMPTS, llama, tokenizer

from surgery.decoding import Sampling
from surgery.errors import SurgeryError
from surgery.logits import generate, log_likelihood, member, rules, speculate, stream
from surgery.logits.explore import explore
from surgery.logits.hooks import EnsembleLogitsProcessor, as_generate

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")
WAYS = {"greedy": Sampling(12, temperature=0.0), "drawn": Sampling(12, temperature=1.5, top_p=0.9, batch_size=3)}


def adapted(model, name, seed):
    """B also has a head of its own, and works on other layers than A."""
    more = (
        {"target_modules": ["q_proj"]}
        if name == "A"
        else {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}
    )
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **more)
    torch.manual_seed(seed)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if f".{name}." in key:
                value.add_(0.3 * torch.randn(value.shape))
    return model


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """(one model with both adapters, {name: a model of its own with one of them, or without})"""
    base, folder = llama(1), tmp_path_factory.mktemp("adapters")
    both = adapted(adapted(copy.deepcopy(base), "A", 3), "B", 4).eval()
    both.save_pretrained(folder)
    loaded = {name: peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / name).eval() for name in ("A", "B")}
    return both, loaded | {"none": base}


@pytest.fixture(scope="module")
def large():
    return member(llama(2, hidden=24), tokenizer(), name="large")


def pair(apart, first="A", second="B"):
    """The two as adapters of one model, and as models of their own; of equal names."""
    both, loaded = apart
    of = {"A": "A", "B": "B", "none": False}
    one = [member(both, tokenizer(), adapter=of[name], name=name) for name in (first, second)]
    return one, [member(loaded[name], tokenizer(), name=name) for name in (first, second)]


def same(found, expected):
    assert [one.completion_ids for one in found] == [one.completion_ids for one in expected]
    assert any(one.completion_ids for one in found)
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        assert list(one.members) == list(other.members)
        for name, values in one.members.items():
            assert values == pytest.approx(other.members[name], abs=1e-5)


def standing(model):
    """What a forward pass, a training step and a saved file depend on."""
    layers = [(m._active_adapter, m._disable_adapters) for m in model.modules() if hasattr(m, "_disable_adapters")]
    flags = [(p.requires_grad, p.sum().item()) for p in model.parameters()]
    return copy.deepcopy(layers), flags, model.active_adapters, [m.training for m in model.modules()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", [("A", "B"), ("B", "A"), ("A", "none"), ("none", "B")], ids="-".join)
def test_they_say_what_models_apart_say(apart, large, names, way):
    before = standing(apart[0])
    (one, two), (other, another) = pair(apart, *names)
    together, separate = large + 1.0 * (one - two), large + 1.0 * (other - another)
    assert len(together.readers) == 3 and len(together.models) == 2
    how = {"sampling": WAYS[way], "group": 1 if way == "greedy" else 2, "seed": 5, "members": True}
    same(generate(together, PROMPTS, **how), generate(separate, PROMPTS, **how))
    assert standing(apart[0]) == before
    plain = generate(large, PROMPTS, sampling=WAYS[way])
    assert [g.completion_ids for g in generate(together, PROMPTS, sampling=WAYS[way])] != [
        g.completion_ids for g in plain
    ]


def test_in_every_way_to_decode_and_to_score(apart, large):
    (one, two), (other, another) = pair(apart)
    together, separate = large + 1.0 * (one - two), large + 1.0 * (other - another)
    greedy = WAYS["greedy"]
    same(*(generate(e, PROMPTS, sampling=greedy, beams=3, group=2, members=True) for e in (together, separate)))
    found = speculate(together, PROMPTS, draft=one, sampling=greedy, members=True)
    same(found, speculate(separate, PROMPTS, draft=other, sampling=greedy, members=True))
    assert found.report.calls["A"] > found.report.calls["B"] > 0
    pieces = [[p.token for p in stream(e, PROMPTS[1], sampling=greedy)] for e in (together, separate)]
    assert pieces[0] == pieces[1]
    texts = [[9, 8, 7, 6], [11], [12, 30], [5]]
    for scored, expected in zip(*(log_likelihood(e, PROMPTS, texts) for e in (together, separate)), strict=True):
        assert scored.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
    lenses = [rules.dola(thing, [0]) for thing in (two, another)]  # whose head is the adapter's
    same(*(generate(lens, PROMPTS, sampling=greedy, members=True) for lens in lenses))


@pytest.mark.parametrize("first", ["A", "none"])
def test_a_base_that_learns_learns_with_its_adapter(apart, first):
    found = [
        explore(base, tuned, n=3, length=6, iterative=True, lr=1e-2, seed=3) for base, tuned in pair(apart, first, "B")
    ]
    assert [one.ids for one in found[0].texts] == [one.ids for one in found[1].texts]
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-3)


def test_members_meet_by_adapter(apart):
    both, _ = apart
    a, b, none, plain = (member(both, tokenizer(), adapter=name) for name in ("A", "B", False, None))
    assert len((a + b + none + plain + member(both, tokenizer(), adapter="A")).members) == 4
    assert len((a + member(both, tokenizer(), adapter="A", layer=0)).readers) == 1
    assert str(none + (a - none)) == str(a) == "PeftModelForCausalLM+A"


def test_without_a_name_it_is_as_the_model_stands(apart):
    both, loaded = apart
    plain, greedy = member(both, tokenizer()), WAYS["greedy"]
    assert both.active_adapters == ["A"]

    def said(thing):
        return [one.completion_ids for one in generate(thing, PROMPTS, sampling=greedy)]

    texts = {name: said(member(model, tokenizer())) for name, model in loaded.items()}
    assert texts["A"] != texts["B"] != texts["none"] != texts["A"]
    assert said(plain) == texts["A"]
    both.set_adapter("B")
    try:
        assert said(plain) == texts["B"] and said(member(both, tokenizer(), adapter="A")) == texts["A"]
        with both.disable_adapter():
            before = standing(both)
            assert said(plain) == texts["none"] and said(member(both, tokenizer(), adapter="B")) == texts["B"]
            assert standing(both) == before
    finally:
        both.set_adapter("A")


def test_an_exception_puts_the_active_one_back(apart, large, monkeypatch):
    both, _ = apart
    (one, two), _ = pair(apart)
    together, before = large + 1.0 * (one - two), standing(both)
    assert together.readers
    active = []

    def failing(self, args):
        active.append(self._active_adapter)
        raise KeyboardInterrupt

    layer = next(m for m in both.modules() if isinstance(m, peft.tuners.lora.Linear))
    hook = layer.register_forward_pre_hook(failing)
    try:
        with pytest.raises(KeyboardInterrupt):
            log_likelihood(together, PROMPTS[:1], [[5]])
    finally:
        hook.remove()
    assert active == [["A"]] and standing(both) == before


def test_inside_of_transformers(apart):
    """As the loop of `generate` a base may have an adapter; as a logits processor it is what the model itself says."""
    (one, two), (other, another) = pair(apart)
    together, separate = one + 0.5 * two, other + 0.5 * another
    ids = torch.tensor(PROMPTS[:1])
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    found = [
        e.base.model.generate(input_ids=ids, custom_generate=as_generate(e), **how).tolist()
        for e in (together, separate)
    ]
    assert found[0] == found[1]
    with pytest.raises(SurgeryError, match="a named adapter"):
        EnsembleLogitsProcessor(together, one.base.model)
    both = apart[0]
    plain = member(both, tokenizer(), name="A") + 0.5 * two
    processed = both.generate(input_ids=ids, logits_processor=[EnsembleLogitsProcessor(plain, both)], **how)
    assert processed.tolist() == found[0]


@pytest.mark.parametrize("adapter, told", [
    ("C", "no adapter 'C'.\nIt has: A, B"), (True, "adapter of 'both' is True"), (0, "adapter of 'both' is 0"),
])  # fmt: skip
def test_adapters_that_are_not_there(apart, adapter, told):
    with pytest.raises(SurgeryError, match=told):
        member(apart[0], tokenizer(), adapter=adapter, name="both")


def test_models_without_adapters_and_merged_ones(apart, large):
    for adapter in ("A", False):
        with pytest.raises(SurgeryError, match="'bare' has no adapters"):
            member(llama(1), tokenizer(), adapter=adapter, name="bare")
    merged = copy.deepcopy(apart[0])
    merged.merge_adapter()
    with pytest.raises(SurgeryError, match="merged into the weights"):
        generate(large + member(merged, tokenizer(), adapter="B"), PROMPTS, sampling=WAYS["greedy"])
