"""Contributions against plain hooks on every family; scaling in forward passes and in generation with both caches."""

import copy

import pytest
import torch
from activations.families import EAGER_ONLY, FAMILIES, PARALLEL, build, prompts, tuned
from activations.state import unchanged

from surgery.activations import capture, edit
from surgery.activations.decomposition import decompose, scaled
from surgery.activations.pairs import equal_layers, pair_of
from surgery.anatomy import anatomy_of
from surgery.anatomy.points import first_tensor
from surgery.errors import SurgeryError
from surgery.interop import without_adapters
from surgery.models import Batch, Pair, encode

torch.set_num_threads(1)
CLEAN = prompts()[0]
MASK = torch.ones_like(CLEAN, dtype=torch.bool)
MASK[1, 6:] = False
MASK[3, 4:] = False
FULL, PADDED = Batch.of(CLEAN), Batch.of(CLEAN, MASK)
GENERATED = ("gpt2", "llama_gqa", "gemma3_text", "falcon_new", "bloom", "mixtral")
LEFT = encode(None, [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24]], side="left")


def pair(name="gpt2", attn="sdpa", dtype=torch.float32):
    base = build(name, attn, dtype=dtype)
    return base, tuned(base)


@torch.no_grad()
def reference(base, model, batch):
    """PTC and FTC (layer, batch, pos, d_model): each base block is called in a hook, as the tuned block was."""
    others, ptc, ftc, handles = anatomy_of(base).blocks, [], [], []

    def hook_of(layer):
        def hook(module, args, kwargs, output):
            stream = args[0] if args else kwargs["hidden_states"]
            would = first_tensor(others[layer](*args, **kwargs))
            ptc.append(would - stream)
            ftc.append(first_tensor(output) - would)

        return hook

    for layer, block in enumerate(anatomy_of(model).blocks):
        handles.append(block.register_forward_hook(hook_of(layer), with_kwargs=True))
    model(**batch.inputs(model), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(ptc), torch.stack(ftc)


def at_last(stream, batch):
    return stream[:, torch.arange(len(batch)), batch.last]


def close(one, other, tolerance=1e-6):
    """Within `tolerance` of the scale of what is compared."""
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance * other.abs().max(), (one - other).abs().max()


# ---- contributions


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_contributions_are_those_of_plain_hooks(name, attn):
    if attn == "sdpa" and name in EAGER_ONLY:
        pytest.skip("eager only")
    base, model = pair(name, attn)
    for batch in (FULL, PADDED):
        ptc, ftc = reference(base, model, batch)
        found = decompose((base, model), batch)
        close(found.pretraining, at_last(ptc, batch))
        close(found.finetuning, at_last(ftc, batch), 2e-6)  # differences of blocks, a quarter of their scale
        total = found.pretraining.sum(0) + found.finetuning.sum(0)
        close(found.start + total, found.end, 1e-6)
        every = decompose((base, model), batch, per_token=True)
        real = batch.mask
        close(every.tokens[0][real], ptc.sum(0)[real])
        close(every.tokens[1][real], ftc.sum(0)[real], 2e-6)
        close(every.pretraining, at_last(ptc, batch))


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma3_text", "olmo2", "mixtral", "bloom"])
def test_sublayers_are_attention_and_then_the_mlp_on_the_tuned_stream_behind_it(name):
    base, model = pair(name)
    one = anatomy_of(base)
    found = decompose((base, model), PADDED, granularity="sublayer")
    every = decompose((base, model), PADDED, granularity="sublayer", per_token=True)
    assert found.steps == ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp"]
    close(found.start + found.pretraining.sum(0) + found.finetuning.sum(0), found.end, 1e-6)
    close(every.pretraining, found.pretraining)
    with torch.no_grad(), capture(model, ["resid_pre", "resid_mid", "mlp_out", "attn_out"]) as seen:
        model(**PADDED.inputs(model), use_cache=False)
    for layer in range(3):
        stream, middle = seen[f"resid_pre.{layer}"], seen[f"resid_mid.{layer}"]
        replaced = {f"resid_pre.{layer}": stream}
        with torch.no_grad(), edit(base, replaced), capture(base, [f"attn_out.{layer}"]) as own:
            base(**PADDED.inputs(base), use_cache=False)
            attention = own[f"attn_out.{layer}"]
        norm, behind = one.norm("mlp_norm", layer), one.norm("mlp_out_norm", layer)
        with torch.no_grad():
            normed = middle if norm is None else norm(middle)
            mlp = first_tensor(one.mlp(layer)(normed, *([torch.zeros_like(middle)] if name == "bloom" else [])))
            mlp = mlp if behind is None else behind(mlp)
        for step, would, does in ((0, attention, seen[f"attn_out.{layer}"]), (1, mlp, seen[f"mlp_out.{layer}"])):
            close(found.pretraining[2 * layer + step], at_last(would[None], PADDED)[0], 2e-6)
            close(found.finetuning[2 * layer + step], at_last((does - would)[None], PADDED)[0], 4e-6)


@pytest.mark.parametrize("name", sorted(PARALLEL))
def test_sublayers_of_parallel_blocks_add_up_to_blocks(name):
    both = pair(name)
    block, halves = decompose(both, FULL), decompose(both, FULL, granularity="sublayer")
    every = decompose(both, FULL, granularity="sublayer", per_token=True)
    for part in ("pretraining", "finetuning"):
        close(getattr(halves, part).view(3, 2, 4, 32).sum(1), getattr(block, part), 4e-6)
        close(getattr(every, part), getattr(halves, part), 4e-6)


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"granularity": "sublayer"}])
def test_equal_models_contribute_exactly_nothing(options):
    base = build("llama_gqa")
    same = copy.deepcopy(base)
    assert equal_layers(anatomy_of(base), anatomy_of(same)) == {0, 1, 2}
    found = decompose((base, same), PADDED, **options)
    assert not found.finetuning.any() and found.pretraining.any()
    assert torch.equal(found.start, found.base_start)
    # and so when the base's blocks are run all the same
    run_twice = decompose((base, same), PADDED, **options, equal=set())
    close(run_twice.pretraining, found.pretraining)
    assert run_twice.finetuning.abs().max() <= (0 if "per_token" in options else 2e-6)


def test_equal_layers_are_found_and_not_run():
    base, model = pair("llama_gqa")
    model.model.layers[1] = copy.deepcopy(base.model.layers[1])
    assert equal_layers(anatomy_of(base), anatomy_of(model)) == {1}
    calls = []
    handle = base.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    found = decompose((base, model), FULL)
    handle.remove()
    assert not calls and not found.finetuning[1].any() and found.finetuning[2].any()
    ptc, _ = reference(base, model, FULL)
    close(found.pretraining, at_last(ptc, FULL))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-3  # the very last number of one tensor
    assert equal_layers(anatomy_of(base), anatomy_of(model)) == set()


def test_left_padding_and_single_prompts_give_the_same():
    both = pair("gpt2")
    left = decompose(both, LEFT)
    for row in range(3):
        ids = LEFT.ids[row][LEFT.mask[row]][None]
        single = decompose(both, Batch.of(ids))
        for part in ("pretraining", "finetuning"):
            close(getattr(left, part)[:, row : row + 1], getattr(single, part), 5e-6)
        close(left.end[row : row + 1], single.end, 5e-6)


def test_embeddings_are_the_tuned_models_and_tokens_unknown_to_the_base_are_not_a_number():
    base, model = pair("gpt2")
    model.resize_token_embeddings(64)
    batch = Batch.of(torch.tensor([[5, 6, 7], [5, 63, 7], [5, 6, 62]]))
    found = decompose((base, model), batch)
    assert torch.isfinite(found.pretraining).all()
    with torch.no_grad():
        expected = base.transformer.wte.weight[7] + base.transformer.wpe.weight[2]
    close(found.base_start[:2], expected.expand(2, -1))
    assert found.base_start[2].isnan().all()
    assert (found.start[0] - found.base_start[0]).abs().max() > 0.01


def test_bf16_is_near_float32():
    base, model = pair("llama_gqa")
    exact = decompose((base, model), FULL)
    rough = decompose((copy.deepcopy(base).bfloat16(), copy.deepcopy(model).bfloat16()), FULL)
    assert rough.pretraining.dtype == torch.float32
    for part in ("pretraining", "finetuning"):
        close(getattr(rough, part).sum(0), getattr(exact, part).sum(0), 6e-2)  # the streams are bf16: 8 bits
    same = copy.deepcopy(base).bfloat16()
    assert not decompose((same, copy.deepcopy(same)), FULL).finetuning.any()


# ---- scaling


def grafted(base, model):
    """The base's blocks between the tuned model's embeddings and head."""
    found = copy.deepcopy(model)
    for mine, theirs in zip(anatomy_of(found).blocks, anatomy_of(base).blocks, strict=True):
        mine.load_state_dict(theirs.state_dict())
    return found


@torch.no_grad()
def generated(model, batch=LEFT, **options):
    told = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**batch.inputs(model), **(told | options))
    return found.sequences, torch.stack(found.scores, 1)


def same(one, other):
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_passes_are_mixtures_of_blocks(name):
    base, model = pair(name)
    with torch.no_grad():
        stream = []
        with capture(model, ["resid_pre", "resid_post"]) as seen, scaled((base, model), [1.3, 0.5, 1.0]) as inside:
            assert inside is model
            model(**PADDED.inputs(model), use_cache=False)
        with scaled((base, model), [1.3, 0.5, 1.0]), capture(model, ["resid_pre", "resid_post"]) as seen:
            model(**PADDED.inputs(model), use_cache=False)
        for layer, alpha in enumerate([1.3, 0.5, 1.0]):
            start, end = seen[f"resid_pre.{layer}"], seen[f"resid_post.{layer}"]
            with capture(model, [f"resid_post.{layer}"]) as mine, edit(model, {f"resid_pre.{layer}": start}):
                model(**PADDED.inputs(model), use_cache=False)
            with capture(base, [f"resid_post.{layer}"]) as theirs, edit(base, {f"resid_pre.{layer}": start}):
                base(**PADDED.inputs(base), use_cache=False)
            stream = [v[f"resid_post.{layer}"][PADDED.mask] for v in (theirs, mine)]
            close(end[PADDED.mask], (1 - alpha) * stream[0] + alpha * stream[1], 2e-6)


@pytest.mark.parametrize("name", GENERATED)
def test_generation_keeps_both_caches(name):
    base, model = pair(name)
    plain, other = generated(model), generated(grafted(base, model))
    with scaled((base, model), 1.0):
        same(generated(model), plain)
    with scaled((base, model), 0.0):
        same(generated(model), other)
    with scaled((base, model), 1.3):
        cached, again = generated(model), generated(model)  # several calls in one context
        whole = generated(model, use_cache=False)
        beams, slow = generated(model, num_beams=3), generated(model, num_beams=3, use_cache=False)
        row = LEFT.ids[1][LEFT.mask[1]][None]
        alone = generated(model, Batch.of(row))
    same(cached, again)
    assert torch.equal(cached[0], whole[0]) and (cached[1] - whole[1]).abs().max() < 1e-5
    assert (cached[1] - plain[1]).abs().max() > 0.1  # it does change what comes out
    assert torch.equal(beams[0], slow[0]) and (beams[1] - slow[1]).abs().max() < 1e-5
    assert torch.equal(alone[0][0], cached[0][1][-11:]) and (alone[1][0] - cached[1][1]).abs().max() < 1e-5
    same(generated(model), plain)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma3_text", "olmo2", "mixtral", "bloom", "falcon_new"])
def test_sublayers_are_mixed_one_after_the_other(name):
    base, model = pair(name)
    plain, other = generated(model), generated(grafted(base, model))
    with scaled((base, model), 1.0, granularity="sublayer"):
        same(generated(model), plain)
    with scaled((base, model), 0.0, granularity="sublayer"):
        same(generated(model), other)
    with scaled((base, model), 1.3, granularity="sublayer"):
        cached, whole = generated(model), generated(model, use_cache=False)
        with torch.no_grad(), capture(model, ["resid_pre.1", "resid_post.1"]) as seen:
            model(**PADDED.inputs(model), use_cache=False)
    assert torch.equal(cached[0], whole[0]) and (cached[1] - whole[1]).abs().max() < 1e-5
    with scaled((base, model), 1.3):
        by_block = generated(model, use_cache=False)
    apart = (by_block[1] - whole[1]).abs().max()
    assert (apart == 0) if name in PARALLEL else (apart > 1e-3)
    if name == "llama_gqa":  # by hand
        stream = seen["resid_pre.1"]
        attention = []
        with torch.no_grad():
            for one in (base, model):
                with edit(one, {"resid_pre.1": stream}), capture(one, ["attn_out.1"]) as own:
                    one(**PADDED.inputs(one), use_cache=False)
                attention.append(own["attn_out.1"])
            middle = stream + torch.lerp(*attention, 1.3)
            blocks = [one.model.layers[1] for one in (base, model)]
            mlps = [block.mlp(block.post_attention_layernorm(middle)) for block in blocks]
        close(seen["resid_post.1"][PADDED.mask], (middle + torch.lerp(*mlps, 1.3))[PADDED.mask], 2e-6)


def test_some_layers_only():
    base, model = pair("llama_gqa")
    said = [(1.3, {"layers": [1]}), ([1.0, 1.3, 1.0], {}), ({1: 1.3}, {}), (torch.tensor([1.3]), {"layers": [1]})]
    found = []
    for alpha, options in said:
        with scaled((base, model), alpha, **options):
            found.append(generated(model))
    assert all((one[1] - found[0][1]).abs().max() < 1e-5 for one in found)
    with scaled((base, model), 1.3, layers=[1]):
        assert (generated(model, use_cache=False)[1] - found[0][1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3_text"])
def test_tokens_that_were_guessed_wrong_leave_both_caches(name, monkeypatch):
    from transformers.cache_utils import DynamicCache

    base, model = pair(name)
    batch, cut, crop = Batch.of([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6]]), [], DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda self, count: (cut.append(count), crop(self, count))[1])
    for layers in ([1], None):
        with scaled((base, model), 1.3, layers=layers):
            guessed, plain = generated(model, batch, prompt_lookup_num_tokens=2), generated(model, batch)
        assert torch.equal(guessed[0], plain[0]) and (guessed[1] - plain[1]).abs().max() < 1e-5
    assert any(count < 0 for count in cut)


def test_equal_layers_are_skipped_when_scaling():
    base, model = pair("llama_gqa")
    model.model.layers[0] = copy.deepcopy(base.model.layers[0])
    calls = []
    pair_of((base, model))  # whose anatomies are checked by running them
    handle = base.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with scaled((base, model), 1.3):
        cached, whole = generated(model), generated(model, use_cache=False)
    handle.remove()
    assert not calls and (cached[1] - whole[1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_a_cache_can_be_kept_copied_and_continued_inside(name):
    from transformers import DynamicCache

    from surgery.models import cache_name

    base, model = pair(name)
    key, ids = cache_name(model), CLEAN[:2]
    with torch.no_grad(), scaled((base, model), 1.3):
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :5], **{key: cache})
        other = copy.deepcopy(cache)
        model(CLEAN[2:], use_cache=True)  # another prompt in between, on a cache of its own
        for one in (cache, other):
            parts = [model(ids[:, i : i + 1], **{key: one}).logits for i in range(5, 9)]
            assert (torch.cat(parts, 1) - whole[:, 5:]).abs().max() < 1e-5
        cache.reset()
        assert (model(ids, **{key: cache}).logits - whole).abs().max() < 1e-5
    filled = model(ids, use_cache=True)[key]
    with torch.no_grad(), scaled((base, model), 1.3), pytest.raises(SurgeryError, match="filled outside"):
        model(ids[:, :1], **{key: filled})


def test_static_caches_work_too():
    base, model = pair("llama_gqa")
    with scaled((base, model), 1.3):
        found, again = (generated(model, cache_implementation="static") for _ in range(2))
        whole = generated(model, use_cache=False)
    assert torch.equal(found[0], whole[0]) and (found[1] - whole[1]).abs().max() < 1e-5
    same(found, again)


# ---- models stay as they are


def test_nothing_of_the_models_changes():
    base, model = pair("llama_gqa")
    base.train()
    with unchanged(base, model):
        decompose((base, model), PADDED)
    base.eval()

    def fails(value):
        raise ZeroDivisionError

    with unchanged(base, model):
        with scaled((base, model), 1.2), torch.no_grad():
            model(CLEAN)
            generated(model)
        with pytest.raises(ZeroDivisionError), scaled((base, model), 0.5), edit(model, {"resid_pre.2": fails}):
            model(CLEAN)
        with pytest.raises(ZeroDivisionError), edit(model, {"resid_pre.1": fails}):
            decompose((base, model), CLEAN)
        halves = scaled((base, model), 0.5, granularity="sublayer")
        with pytest.raises(ZeroDivisionError), halves, edit(model, {"mlp_out.1": fails}):
            model(CLEAN)
    with scaled((base, model), 0.5):  # and can be entered again
        pass


def test_the_base_attends_by_the_tuned_models_implementation():
    base, model = build("llama_gqa", "eager"), tuned(build("llama_gqa", "sdpa"))
    alike = decompose((build("llama_gqa", "sdpa"), model), FULL)
    with unchanged(base):
        found = decompose((base, model), FULL)
    assert torch.equal(found.pretraining, alike.pretraining)


@pytest.mark.parametrize(
    ("alpha", "options", "said"),
    [
        (float("nan"), {}, "finite number"),
        ([1.2, 1.3], {}, "2 values of alpha and 3 layers"),
        (1.2, {"layers": [3]}, "no layer 3"),
        ({7: 1.2}, {}, "no layer 7"),
        (1.2, {"granularity": "head"}, "'block' or 'sublayer'"),
    ],
)
def test_wrong_arguments_are_a_sentence(alpha, options, said):
    with pytest.raises(SurgeryError, match=said), scaled(pair("llama_gqa"), alpha, **options):
        pass


def test_models_that_do_not_fit_are_refused():
    base, model = pair("llama_gqa")
    for other, said in (
        (build("llama"), "key-value heads"),
        (build("qwen2"), "blocks of Qwen2DecoderLayer, the tuned model of LlamaDecoderLayer"),
        (copy.deepcopy(base).bfloat16(), "dtype torch.bfloat16, the tuned model in torch.float32"),
    ):
        with pytest.raises(SurgeryError, match=said):
            decompose((other, model), CLEAN)
    other = copy.deepcopy(base)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5.0}
    with pytest.raises(SurgeryError, match="rope_parameters"):
        decompose((other, model), CLEAN)
    with pytest.raises(SurgeryError, match="A pair of models is needed"):
        decompose(model, CLEAN)
    with pytest.raises(SurgeryError, match="training mode"), scaled((base, model.train()), 0.5):
        pass
    model.eval()
    again = scaled((base, model), 0.5)
    with scaled((base, model), 0.5), pytest.raises(SurgeryError, match="scaled already"), again:
        pass


# ---- adapters


def adapted(**options):
    peft = pytest.importorskip("peft")
    base = build("llama_gqa")
    told = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [0, 2]}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**(told | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    return base, model


@pytest.mark.peers
def test_a_peft_model_is_a_pair_with_its_own_base():
    base, model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    with unchanged(model):
        found = decompose(model, PADDED)
        both = pair_of(model)
    assert equal_layers(anatomy_of(both.base), anatomy_of(both.tuned)) == {1}
    expected = decompose((base, merged), PADDED)
    for part in ("pretraining", "finetuning"):
        close(getattr(found, part), getattr(expected, part), 4e-6)
    inside = model.get_base_model()  # PEFT has put its layers into the model that it was given
    close(decompose((inside, model), PADDED).finetuning, found.finetuning)
    assert without_adapters(model) is without_adapters(model)
    assert torch.equal(without_adapters(model)(CLEAN).logits, base(CLEAN).logits)
    with scaled(model, 1.3):
        here = generated(model.get_base_model())
    with scaled((base, merged), 1.3):
        there = generated(merged)
    assert torch.equal(here[0], there[0]) and (here[1] - there[1]).abs().max() < 1e-4


@pytest.mark.peers
def test_adapters_that_have_changed_their_base_are_refused():
    _, model = adapted()
    model.merge_adapter()
    with pytest.raises(SurgeryError, match="merged into the weights"):
        decompose(model, CLEAN)
    _, model = adapted(bias="all")
    with pytest.raises(SurgeryError, match="biases"):
        decompose(model, CLEAN)


def test_a_pair_with_a_tokenizer_reads_texts():
    from surgery.models import load

    base, tokenizer = load("tiny-base")
    model, _ = load("tiny-chain")
    found = decompose(Pair(base, model, tokenizer), ["m 1+1=", "m 2+22="])
    assert found.pretraining.shape[1] == 2 and found.finetuning.abs().max() > 0
