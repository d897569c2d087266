"""Whole passes: padding, generation, passes ended early; and nothing stays behind in a model, whatever happens."""

import gc
import weakref

import pytest
import torch
from activations.families import FAMILIES, PARALLEL, build, prompts
from activations.state import disturbed, unchanged
from activations.unlisted import build_unlisted

from surgery.activations import capture, edit, run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import encode

torch.set_num_threads(1)
CLEAN, CORRUPT, _ = prompts()
ROWS = [CLEAN[0, :4].tolist(), CLEAN[1].tolist(), CLEAN[2, :1].tolist(), CLEAN[3, :7].tolist()]
SITES = ["resid_post.2", "z.1", "k.1", "mlp_out.1", "final@-1", "attn_out.2@0", "attn_out.2@-1"]


# ---- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_prompts_are_what_they_are_alone(name, side):
    """Within 1e-5, values and edits, whichever side is padded, and whether or not positions are passed (GPT-2, OPT)."""
    model, batch = build(name), encode(None, ROWS, side=side)
    edits = {"resid_pre.1@-1": 0.5, "z.1.2@0": lambda x: x + 1, "attn_out.0@3": lambda x: 2 * x, "v.1": lambda x: 2 * x}
    alone = [run(model, [row], SITES, edits=edits)[1] for row in ROWS]
    _, seen = run(model, batch, SITES, edits=edits)
    with torch.no_grad(), edit(model, edits), capture(model, SITES) as bare:
        model(input_ids=batch.ids, attention_mask=batch.mask.long())
    for found in (seen, bare):
        for site in SITES:
            for i, single in enumerate(alone):
                here = found[site][i] if "@" in site else found[site][i, batch.mask[i]]
                torch.testing.assert_close(here, single[site][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma3_text", "bloom"])
def test_patterns_of_padded_prompts(name):
    model = build(name, "eager")
    for side in ("left", "right"):
        batch = encode(None, ROWS, side=side)
        _, seen = run(model, batch, ["pattern.1", "pattern.1.2@-1"])
        for i, row in enumerate(ROWS):
            _, alone = run(model, [row], ["pattern.1", "pattern.1.2@-1"])
            real = batch.mask[i]
            torch.testing.assert_close(
                seen["pattern.1"][i][:, real][:, :, real], alone["pattern.1"][0], rtol=0, atol=1e-5
            )
            torch.testing.assert_close(seen["pattern.1.2@-1"][i, real], alone["pattern.1.2@-1"][0], rtol=0, atol=1e-5)


def test_rows_without_a_position_are_left_out():
    model, batch = build("llama_gqa"), encode(None, ROWS, side="left")
    _, before = run(model, batch, ["attn_out.1"])
    _, seen = run(model, batch, ["attn_out.1", "attn_out.1@5"], edits={"attn_out.1@5": torch.arange(4.0)[:, None]})
    assert seen["attn_out.1@5"].shape == (2, 32)  # of the two prompts that are long enough, each with its own value
    assert seen["attn_out.1@5"][:, 0].tolist() == [1.0, 3.0]
    assert torch.equal(seen["attn_out.1"][[0, 2]], before["attn_out.1"][[0, 2]])
    _, seen = run(model, batch, ["attn_out.1@30"], edits={"attn_out.1@30": lambda x: 1 / 0})
    assert seen["attn_out.1@30"].shape == (0, 32)


# ---- generation

GENERATING = ["gpt2", "llama_gqa", "gemma3_text", "bloom", "opt", "falcon_new", "mixtral"]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(1))
NEW = 5


def generated(model, batch, edits, when):
    """Tokens (batch, prompt + NEW) and the logits (batch, NEW, vocab) they were chosen by."""
    with edit(model, edits, when=when):
        out = model.generate(**batch.inputs(model) if not batch.padded else
                             {"input_ids": batch.ids, "attention_mask": batch.mask.long()},
                             max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
                             output_logits=True)  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("when", ["always", "prefill", "decode"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("name", GENERATING)
def test_edits_in_generation_are_those_of_one_whole_pass_over_the_same_tokens(name, padded, when):
    """With absolute positions (@6 is generated in some rows and given in others); 2e-5 on logits of order one."""
    model = build(name)
    batch = encode(None, ROWS, side="left") if padded else encode(None, CLEAN[:, :4].tolist())
    edits = {"resid_pre.1": lambda x: x + VECTOR, "z.1.2@6": 0.0, "mlp_out.0@0": lambda x: 2 * x,
             "attn_out.2@5": VECTOR, "k.1": lambda x: 2 * x}  # fmt: skip
    with unchanged(model):
        tokens, logits = generated(model, batch, edits, when)
    for i in range(4):
        real = tokens[i, batch.first[i] if padded else 0 :]
        given = len(real) - NEW
        inside = {"always": slice(None), "prefill": slice(given), "decode": slice(given, None)}[when]

        def only(change, position=None, inside=inside, given=given):
            """The change of one whole pass where the pass of generation made it."""

            def changed(x):
                new = x.clone()
                new[:, inside] = (change(x) if callable(change) else torch.as_tensor(change).expand_as(x))[:, inside]
                if position is not None:
                    new = torch.where((torch.arange(x.shape[1]) == position).view(1, -1, *[1] * (x.dim() - 2)), new, x)
                return new

            return changed

        whole = {"resid_pre.1": only(edits["resid_pre.1"]), "z.1.2": only(0.0, 6), "k.1": only(edits["k.1"]),
                 "mlp_out.0": only(edits["mlp_out.0@0"], 0), "attn_out.2": only(VECTOR, 5)}  # fmt: skip
        wanted, _ = run(model, real[None], edits=whole)
        torch.testing.assert_close(logits[i], wanted[0, given - 1 : -1], rtol=0, atol=2e-5)
    assert (generated(model, batch, {}, when)[1] - logits).abs().max() > 0.01


def test_the_newest_token_of_every_pass():
    model, batch = build("llama_gqa"), encode(None, ROWS, side="left")
    tokens, logits = generated(model, batch, {"resid_pre.2@-1": lambda x: x + VECTOR}, "always")
    for i in range(4):
        real = tokens[i, batch.first[i] :]
        given = len(real) - NEW

        def late(x, given=given):
            return torch.cat([x[:, : given - 1], x[:, given - 1 :] + VECTOR], 1)

        wanted, _ = run(model, real[None], edits={"resid_pre.2": late})
        torch.testing.assert_close(logits[i], wanted[0, given - 1 : -1], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "when, passes", [("always", [True] + [False] * 4), ("prefill", [True]), ("decode", [False] * 4)]
)
def test_calls_of_generation(when, passes):
    model, batch, calls = build("gpt2"), encode(None, ROWS, side="left"), []
    generated(model, batch, {"resid_pre.1": lambda x, call: calls.append((x.shape[1], call))}, when)
    assert [call.prefill for _, call in calls] == passes
    assert [width for width, _ in calls] == [9 if first else 1 for first in passes]
    steps = [call for _, call in calls if not call.prefill]
    assert [call.lengths.tolist() for call in steps] == [[n + 1 + i for n in map(len, ROWS)] for i in range(len(steps))]
    assert all((call.positions[:, 0] == call.lengths - 1).all() for call in steps)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "phi3"])
def test_values_put_together_over_the_steps(name):
    model, batch = build(name), encode(None, CLEAN[:, :4].tolist())
    sites = ["resid_post.1", "z.2", "k.0", "mlp_post.1.7"]
    with capture(model, sites, steps=True) as seen:
        for _ in range(2):  # a new prompt begins anew
            tokens, _ = generated(model, batch, {}, "always")
    _, whole = run(model, tokens[:, :-1], sites)
    for site in sites:
        torch.testing.assert_close(seen[site], whole[site], rtol=0, atol=1e-5)
    with capture(model, "z.2") as seen:
        generated(model, batch, {}, "always")
    torch.testing.assert_close(seen["z.2"], whole["z.2"][:, -1:], rtol=0, atol=1e-5)  # the newest pass
    for site in ("pattern.1", "z.1@-1"):
        with pytest.raises(SurgeryError, match=f"'{site}' can't be put together over the steps"):
            capture(model, site, steps=True).__enter__()


def test_sampled_generation_is_unchanged_by_looking():
    model, batch = build("llama_gqa"), encode(None, ROWS, side="left")
    drawn = []
    for sites in ([], ["z", "resid_pre.1@-1"]):
        torch.manual_seed(0)
        with capture(model, sites):
            drawn.append(model.generate(batch.ids, attention_mask=batch.mask.long(), max_new_tokens=8, do_sample=True))
    assert torch.equal(*drawn)


# ---- the attention that can be seen


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma3_text", "gpt_neox", "qwen3_moe"])
def test_patterns_of_a_model_that_computes_no_softmax(name):
    """Eager for the time being: the patterns are those of the eager model, and the implementation is put back."""
    model = disturbed(build(name, "sdpa"))
    _, wanted = run(build(name, "eager"), CLEAN, ["pattern.1", "scores.2"])
    with unchanged(model):
        _, seen = run(model, CLEAN, ["pattern.1", "scores.2"])
        assert all(torch.equal(seen[s], wanted[s]) for s in seen)
        logits, _ = run(model, CLEAN, edits={"pattern.1": lambda x: x})
    torch.testing.assert_close(logits, run(model, CLEAN)[0], rtol=0, atol=1e-5)


def test_patterns_that_would_be_others_are_refused():
    model = build("falcon_alibi", "sdpa")
    with unchanged(model), pytest.raises(SurgeryError, match="'sdpa' and with 'eager' differ in FalconForCausalLM"):
        run(model, CLEAN, ["pattern.1"])


# ---- one pass


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize(
    "sites, blocks", [(["embed"], 0), (["resid_pre.0"], 0), (["resid_pre.1"], 1), (["z.1@-1", "attn_out.0"], 2),
                      (["resid_post.2"], 3), (["final@-1"], 3), ([], 0)],
)  # fmt: skip
def test_a_pass_that_stops_runs_no_later_block_and_no_head(name, sites, blocks):
    model, ran = build(name), []
    a = anatomy_of(model)
    for i, module in enumerate([*a.blocks, a.head]):
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
    with unchanged(model):
        logits, seen = run(model, CLEAN, sites, stop=True)
        assert logits is None and ran == list(range(blocks))
        logits, whole = run(model, CLEAN, sites)
    assert all(torch.equal(seen[site], whole[site]) for site in sites) and logits.shape == (4, 9, 60)


def test_patterns_come_by_head_also_where_heads_and_prompts_are_one_axis():
    model = build_unlisted("xglm")
    a = anatomy_of(model)
    _, seen = run(model, CLEAN, ["pattern.1", "scores.1", "v.1", "z.1"], edits={"pattern.1.2": lambda x: x.flip(-1)})
    assert seen["pattern.1"].shape == seen["scores.1"].shape == (4, 4, 9, 9)
    z = torch.einsum("bhds,bshe->bdhe", seen["pattern.1"], seen["v.1"])
    torch.testing.assert_close(z, seen["z.1"], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen["scores.1"][:, 3].softmax(-1), seen["pattern.1"][:, 3], rtol=0, atol=1e-6)
    assert a.n_kv_heads == 4


def test_a_last_norm_that_runs_before_the_blocks_too():
    model = build_unlisted("nanochat")
    logits, seen = run(model, CLEAN, ["final", "resid_post.2"])
    _, kept = run(model, CLEAN, ["final@-1", "resid_post.2"], stop=True)
    assert torch.equal(kept["final@-1"], seen["final"][:, -1]) and torch.equal(
        kept["resid_post.2"], seen["resid_post.2"]
    )


def test_run_evaluates_without_gradients_whatever_the_model_is_set_to():
    model = build("gpt2")
    wanted, old = run(model, CLEAN, ["z.1"])
    disturbed(model)
    for outside in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with outside(), unchanged(model):
            logits, seen = run(model, CLEAN, ["z.1"])
            assert torch.equal(logits, wanted) and torch.equal(seen["z.1"], old["z.1"])
            assert not logits.requires_grad and not logits.is_inference() and not seen["z.1"].is_inference()


def test_prompts_of_every_kind():
    model = build("gpt2")
    rows = [row.tolist() for row in CLEAN]
    wanted, _ = run(model, CLEAN)
    for given in (rows, encode(None, rows), {"input_ids": CLEAN, "attention_mask": torch.ones_like(CLEAN)}):
        assert torch.equal(run(model, given)[0], wanted)
    with pytest.raises(SurgeryError, match="No prompts"):
        run(model, [])
    with pytest.raises(SurgeryError, match="pass tokenizer="):
        run(model, ["a text"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_torch(mode):
    model = build("gpt2")
    _, old = run(model, CLEAN, ["z.1"])
    with mode(), unchanged(model):
        with edit(model, {"z.1.2@-1": 0.0, "attn_out.1": lambda x: x + VECTOR}):
            with capture(model, ["z.1"]) as seen:
                model(CLEAN)
            with capture(model, ["pattern.1"]) as pattern:
                model(CLEAN)
        assert (seen["z.1"][:, -1, 2] == 0).all() and torch.equal(seen["z.1"][:, :-1], old["z.1"][:, :-1])
        assert not seen["z.1"].requires_grad and not pattern["pattern.1"].requires_grad


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "falcon_new", "phi3"])
def test_bf16(name):
    model = build(name, dtype=torch.bfloat16)
    _, seen = run(
        model, CLEAN, ["z.1", "resid_pre.1", "attn_out.1@-1"], edits={"z.1.2": VECTOR[:8], "attn_out.1@-1": VECTOR}
    )
    assert seen["z.1"].dtype == torch.bfloat16
    assert torch.equal(seen["z.1"][:, :, 2], VECTOR[:8].bfloat16().expand(4, 9, 8))
    assert torch.equal(seen["attn_out.1@-1"], VECTOR.bfloat16().expand(4, 32))


# ---- exceptions

EDITABLE = ["embed", "resid_pre.1", "resid_mid.1", "resid_post.1@-1", "attn_out.1", "mlp_out.1", "q.1", "k.1.1",
            "z.1.2@3", "scores.1", "pattern.1.2", "mlp_in.1", "mlp_pre.1", "mlp_post.1.3", "final"]  # fmt: skip


@pytest.mark.parametrize("site", EDITABLE)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox", "opt"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_users_function_leaves_everything_as_it_was(name, site, error):
    if "mid" in site and name in PARALLEL:
        return
    model = disturbed(build(name))
    wanted, _ = run(model, CLEAN, ["pattern.0"])

    def fail(value):
        raise error("mine")

    with unchanged(model):
        with pytest.raises(error, match="mine"):
            run(model, CLEAN, ["z.1"], edits={site: fail})
        with (
            pytest.raises(error, match="mine"),
            capture(model, ["z", "pattern"]),
            edit(model, {site: fail}),
        ):
            model(CLEAN)
        with pytest.raises(error, match="mine"), edit(model, {site: fail}):
            model.generate(CLEAN, max_new_tokens=3)
        assert torch.equal(run(model, CLEAN, ["pattern.0"])[0], wanted)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "opt"])
def test_an_exception_inside_the_model(name):
    model = disturbed(build(name))
    block = anatomy_of(model).blocks[1]
    out = anatomy_of(model).out(1)
    for module in (block, out):
        handle = module.register_forward_hook(lambda *_: 1 / 0)
        with unchanged(model):
            for error in (
                lambda: run(model, CLEAN, ["z", "pattern"]),
                lambda: run(model, CLEAN, edits={"scores": lambda x: x}),
            ):
                with pytest.raises(ZeroDivisionError):
                    error()
        handle.remove()
    with unchanged(model), pytest.raises(IndexError):  # a token that it has not
        run(model, CLEAN + 1000, ["z"], edits={"pattern.1": 0.0})


def test_an_exception_on_the_way_in():
    model = disturbed(build("gpt2"))
    with unchanged(model):
        for sites in (["z.1", "z.9"], ["pattern", "nothing"]):
            with pytest.raises(SurgeryError):
                capture(model, sites).__enter__()
            with pytest.raises(SurgeryError):
                edit(model, dict.fromkeys(sites, 0.0)).__enter__()


def test_a_part_of_the_model_called_by_itself():
    """Fine as long as nobody asks which tokens it was given."""
    model, x = build("gpt2"), torch.zeros(1, 3, 32)
    with edit(model, {"attn_out.1": 1.0}), capture(model, "attn_out.1") as seen:
        model.transformer.h[1](x)
    assert (seen["attn_out.1"] == 1).all()
    for site in ("z.1@-1", "pattern.1.2@0"):
        with capture(model, site), pytest.raises(SurgeryError, match="A part of the model was called by itself"):
            model.transformer.h[1](x)
    with edit(model, {"z.1": 0.0}, when="decode"), pytest.raises(SurgeryError, match="which tokens it was given"):
        model.transformer.h[1](x)


def test_nothing_keeps_values_or_models_alive():
    model = build("gpt2")
    with capture(model, ["z.1"]) as seen, edit(model, {"pattern.1": lambda x: x}):
        model(CLEAN)
    run(model, CLEAN, ["z"])
    gone = [weakref.ref(seen["z.1"]), weakref.ref(model), weakref.ref(model.transformer.h[1])]
    del seen, model
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
