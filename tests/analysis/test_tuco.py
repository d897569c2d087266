"""TuCo against plain hooks on every family, and what is known of it by its definition."""

import copy

import numpy as np
import pytest
import torch
from activations.families import FAMILIES, build, prompts, tuned
from activations.state import unchanged
from activations.test_decomposition import at_last, reference

from analysis.results import Result
from analysis.tuco import TuCo, auc_between, compare, contribution, cumulative, output_contribution, share, tuco
from surgery.activations import run
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, encode, load

torch.set_num_threads(1)
CLEAN = prompts()[0]
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def pair():
    base = build("llama_gqa")
    return base, tuned(base)


@pytest.fixture(scope="module")
def tiny():
    return Pair.load("tiny-base", "tiny-chain")


# ---- the definition


def test_the_order_of_layers_plays_no_part_in_tuco_but_in_beta():
    """The paper's example: PTC = (0, 0, h, -h/2) and FTC = (h, -h/2, 0, 0)."""
    h = torch.tensor([1.0, -2.0, 3.0])
    ptc, ftc = torch.stack([0 * h, 0 * h, h, -h / 2]), torch.stack([h, -h / 2, 0 * h, 0 * h])
    assert contribution(ptc, ftc) == 0.5
    assert cumulative(ptc, ftc).tolist() == pytest.approx([1.0, 1.0, 1 / 3, 0.5])
    order = [2, 0, 3, 1]
    assert contribution(ptc[order], ftc[order]) == 0.5
    assert cumulative(ptc[order], ftc[order]).max() < 1.0


def test_norms_are_l1_of_sums():
    ptc, ftc = torch.tensor([[[3.0, 4.0]], [[-1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]], [[1.0, -3.0]]])
    assert contribution(ptc, ftc).tolist() == pytest.approx([4 / (6 + 4)])  # (2, 4) and (2, -2)
    assert share(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
    assert share(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [1]


# ---- measured


@pytest.mark.parametrize("name", FAMILIES)
def test_tuco_is_that_of_plain_hooks(name):
    base = build(name)
    model = tuned(base)
    batch = encode(None, ROWS)
    ptc, ftc = reference(base, model, batch)
    with unchanged(base, model):
        found = tuco((base, model), ROWS, batch_size=3)
        every = tuco((base, model), ROWS, per_token=True)
    last = [at_last(part, batch) for part in (ptc, ftc)]
    expected = contribution(*last).numpy()
    assert np.abs(found.value.values - expected).max() < 1e-6
    assert np.abs(every.value.values - expected).max() < 1e-6
    assert np.abs(found.pre.values + found.value.values - 1).max() < 1e-12
    assert np.abs(found.beta.values - cumulative(*last).T.numpy()).max() < 1e-6
    assert np.abs(found.beta.values[:, -1] - found.value.values).max() < 1e-6
    for part, expected_part in ((found.pretraining, last[0]), (found.finetuning, last[1])):
        norms = expected_part.abs().sum(-1).T.numpy()
        assert np.abs(part.values - norms).max() < 1e-5 * norms.max()
    tokens = share(ptc.sum(0), ftc.sum(0)).numpy()
    real = batch.mask.numpy()
    assert np.abs(every.tokens.values - tokens)[real].max() < 1e-6
    assert np.isnan(every.tokens.values[~real]).all()


def test_examples_keep_their_order_and_do_not_depend_on_their_batch(pair):
    alone = [tuco(pair, [row]).value.values[0] for row in ROWS]
    seen = []
    for size in (1, 2, 16):
        found = tuco(pair, ROWS, batch_size=size, progress=lambda done, of: seen.append((done, of)))
        assert found.value.values == pytest.approx(alone, abs=1e-6)
        assert list(found.value.columns["length"]) == [7, 3, 5, 4]
    assert seen[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)] and seen[-1] == (4, 4)
    for side in ("left", "right"):
        assert tuco(pair, encode(None, ROWS, side=side)).value.values == pytest.approx(alone, abs=1e-6)


def test_equal_models_have_no_tuning_contribution(pair):
    base = pair[0]
    for options in ({}, {"per_token": True}, {"granularity": "sublayer"}):
        found = tuco((base, copy.deepcopy(base)), ROWS, **options)
        assert not found.value.values.any() and not found.beta.values.any() and not found.finetuning.values.any()
        assert not found.embedding.values.any() and (found.pre.values == 1).all()
        assert found.tokens is None or not np.nan_to_num(found.tokens.values).any()


def test_sublayers_are_steps_of_their_own(pair):
    found, blocks = tuco(pair, ROWS, granularity="sublayer"), tuco(pair, ROWS)
    assert found.beta.axes["layer"] == ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp"]
    assert blocks.beta.axes["layer"] == [0, 1, 2]
    assert found.value.meta["granularity"] == "sublayer"
    assert np.abs(found.value.values - blocks.value.values).max() > 1e-3  # another decomposition


def test_more_of_the_fine_tuning_means_more_tuco(pair):
    base, model = pair
    means = []
    for part in (0.1, 0.3, 1.0):
        between = copy.deepcopy(base)
        with torch.no_grad():
            for mine, other in zip(between.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, part)
        means.append(float(tuco((base, between), CLEAN).value.mean))
    assert 0 < means[0] < means[1] < means[2] < 1


def test_changed_embeddings_are_reported_apart():
    base = build("gpt2")
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.transformer.wte.weight[11] += 0.5
    found = tuco((base, model), ROWS)
    assert not found.value.values.any()  # the blocks are the same
    with torch.no_grad():
        start = base.transformer.wte.weight[11] + base.transformer.wpe.weight[6]
    expected = 16 / (16 + float(start.abs().sum()))
    assert found.embedding.values == pytest.approx([expected, 0, 0, 0], abs=1e-6)
    model.resize_token_embeddings(62)
    assert np.isnan(tuco((base, model), [[5, 61]]).embedding.values[0])


def test_output_contribution_is_of_two_separate_passes(pair):
    base, model = pair
    with unchanged(base, model):
        found = output_contribution(pair, ROWS, batch_size=3)
    ends = [run(m, ROWS, ["resid_post.2@-1"])[1]["resid_post.2@-1"] for m in pair]
    d = (ends[1] - ends[0]).abs().sum(-1)
    assert found.values == pytest.approx((d / (ends[0].abs().sum(-1) + d)).tolist(), abs=1e-6)
    assert not output_contribution((base, copy.deepcopy(base)), ROWS).values.any()
    bigger = copy.deepcopy(model)
    bigger.resize_token_embeddings(62)
    with pytest.raises(SurgeryError, match="Prompt 1 has the token 61, .* vocabulary of 60"):
        output_contribution((base, bigger), [[5], [5, 61]])


def test_bf16_is_near_float32(pair):
    exact = tuco(pair, ROWS).value.values
    rough = tuco(tuple(copy.deepcopy(m).bfloat16() for m in pair), ROWS).value.values
    assert np.abs(rough - exact).max() < 2e-2


# ---- sets of prompts, pictures, texts


def test_auc_between_sets_of_prompts():
    upper, lower = Result.of([0.4, 0.5, 0.6], name="TuCo"), Result.of([0.1, 0.45, 0.2], name="TuCo")
    found = auc_between(upper, lower)
    assert found.value == pytest.approx(8 / 9) and 0 < found.low < found.value < found.high < 1
    assert auc_between(lower, upper).value == pytest.approx(1 / 9)


def test_texts_of_a_pair_and_their_coloured_tokens(tiny, tmp_path):
    texts = ["m 1+1=", "m 2+22=", "<b>m 3"]
    found = tuco(tiny, texts, per_token=True)
    assert str(found).startswith("TuCo 0.") and len(found) == 3
    assert found.tokens.columns["tokens"][0] == tiny.encode(texts).tokens(tiny.tokenizer)[0]
    page = found.html([0, 2])
    assert page.body.count("<span") >= found.value.columns["length"][0] + found.value.columns["length"][2]
    assert "<b>" not in page.body and "example 2: TuCo" in page.body and "example 1" not in page.body
    path = found.value.save(tmp_path / "tuco")
    assert Result.load(path.with_suffix("")).values == pytest.approx(found.value.values)
    with pytest.raises(SurgeryError, match="per_token=True"):
        tuco(tiny, texts).html()


def test_figures(pair):
    found = tuco(pair, CLEAN)
    halves = tuco(pair, CLEAN, granularity="sublayer")
    axis = found.plot().axes[0]
    assert axis.get_ylabel() == "cumulative share of fine-tuning" and len(axis.containers) == 1
    assert len(found.plot_norms().axes[0].containers) == 2
    assert halves.plot().axes[0].containers[0].lines[0].get_xdata().tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    beta = found.beta
    grouped = Result(beta.values, beta.axes, beta.name, {"kind": ["a", "b", "a", "b"]}, beta.meta)
    parts = TuCo(found.value, grouped, found.pretraining, found.finetuning, found.embedding)
    assert [t.get_text() for t in parts.plot(by="kind").legends[0].get_texts()] == ["a", "b"]
    assert "n = 4" in compare({"chat": found, "web": halves.value}).axes[0].get_xticklabels()[0].get_text()
    assert (found.largest_beta.values == found.beta.values.max(1)).all()


# ---- wrong input


def test_wrong_input_is_a_sentence(pair, tiny):
    base, model = pair
    for prompts_, said in (([], "No prompts"), (["text"], "tokenizer"), ("text", "come in a list")):
        with pytest.raises(SurgeryError, match=said):
            tuco(pair, prompts_)
    with pytest.raises(SurgeryError, match="batch_size"):
        tuco(pair, ROWS, batch_size=0)
    with pytest.raises(SurgeryError, match="'block' or 'sublayer'"):
        tuco(pair, ROWS, granularity="head")
    with pytest.raises(SurgeryError, match="the tuned model"):
        tuco((build("llama"), model), ROWS)
    with pytest.raises(SurgeryError, match="no model that can be looked into"):
        tuco((base, "tuned"), ROWS)
    other = copy.deepcopy(tiny.tokenizer)
    other.add_tokens(["1+1"])
    with pytest.raises(SurgeryError, match="disagree on prompt 0"):
        tuco(Pair(tiny.base, tiny.tuned, tiny.tokenizer, other), ["m 1+1="])


@pytest.mark.peers
def test_processed_weights_are_refused(pair):
    pytest.importorskip("transformer_lens")
    from surgery.interop import to_transformer_lens

    base, model = pair
    bridges = [to_transformer_lens(m) for m in pair]
    eager = [copy.deepcopy(m) for m in pair]
    for one in eager:
        one.set_attn_implementation("eager")
    assert tuco(tuple(bridges), ROWS).value.values == pytest.approx(tuco(tuple(eager), ROWS).value.values, abs=1e-6)
    bridges[1].enable_compatibility_mode()
    with pytest.raises(SurgeryError, match="compatibility mode"):
        tuco(tuple(bridges), ROWS)


def test_a_folder_of_texts_goes_through_the_pair():
    base, tokenizer = load("tiny-base")
    model, _ = load("tiny-chain")
    found = tuco((base, model), ["m 1+1=", "m 2+2="], tokenizer=tokenizer)
    again = tuco((base, model), Batch.of(encode(tokenizer, ["m 1+1=", "m 2+2="]).ids))
    assert found.value.values == pytest.approx(again.value.values)
