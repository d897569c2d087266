"""Passes taken up again: every family, padded or not, with either attention, against whole forward passes."""

import pytest
import torch
from activations.families import EAGER_ONLY, FAMILIES, PARALLEL, build, prompts
from activations.state import disturbed, unchanged

from surgery.activations import capture, edit, recording, resume, run
from surgery.activations.recording import record
from surgery.activations.resume import Entry
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import encode

torch.set_num_threads(1)
CLEAN, CORRUPT, _ = prompts()
ROWS = [CORRUPT[0, :6].tolist(), CORRUPT[1].tolist(), CORRUPT[2, :2].tolist(), CORRUPT[3, :7].tolist()]
PLAIN, PADDED = encode(None, CORRUPT.tolist()), encode(None, ROWS)
START = 3
KINDS = [(name, "sdpa", batch) for name in FAMILIES if name not in EAGER_ONLY for batch in ("plain", "padded")]
KINDS += [
    (name, "eager", batch)
    for name in FAMILIES
    for batch in ("plain", "padded")
    if batch == "padded" or name in EAGER_ONLY
]
"""Every family; eager attention is given a mask in any case, so that there padding says it all."""
BATCHES = {"plain": PLAIN, "padded": PADDED}


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(found, wanted, relative=2e-6):
    """Within 2e-6 of the size of what is compared: float32, the same kernel on other shapes."""
    scale = float(wanted.abs().max().clamp(min=1)) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=relative * scale)


def from_start(value, start=START):
    """An edit that writes (batch, pos - start, ...) behind `start`."""
    return lambda old: torch.cat([old[:, :start], value], 1)


@pytest.mark.parametrize("name, attn, batch", KINDS)
def test_blocks_by_themselves(name, attn, batch):
    model, batch = disturbed(build(name, attn)), BATCHES[batch]
    logits, _ = run(model, batch)
    with unchanged(model):
        kept = record(model, batch, ["z.1"])
    real, last = batch.mask, batch.last
    near(kept.logits()[real], logits[real])
    assert torch.equal(kept.seen["z.1"][real], run(model, batch, ["z.1"])[1]["z.1"][real])
    assert len(kept.stream) == 4 and len(kept.keys) == len(kept.attn_out) == 3
    with unchanged(model), torch.no_grad():
        for layer in range(3):
            for start in (0, START) if layer == 1 else (START,):
                stream = kept.stream[layer][:, start:]
                after, here = kept.stream[layer + 1][:, start:], real[:, start:]
                near(resume.block(kept, layer, stream, start)[here], after[here])
                # two changes at once: each as if it were alone, and the recorded one as recorded
                other = stream + noise(stream.shape)
                both = resume.block(kept, layer, torch.cat([other, stream]), start)
                near(both[4:][here], after[here])
                _, seen = run(
                    model, batch, [f"resid_post.{layer}"], edits={f"resid_pre.{layer}": from_start(other, start)}
                )
                wanted = seen[f"resid_post.{layer}"]
                near(both[:4][here], wanted[:, start:][here])
                # one token of each row
                long = last >= start
                end = resume.last_token(kept, layer, torch.cat([other, stream]), start)
                near(end[:4][long], wanted[torch.arange(4), last][long])
                near(end[4:][long], kept.stream[layer + 1][torch.arange(4), last][long])
                # keys and values alone
                for made, recorded in zip(
                    resume.keys_values(kept, layer, stream, start), (kept.keys, kept.values), strict=True
                ):
                    near(made.transpose(1, 2)[here], recorded[layer][:, :, start:].transpose(1, 2)[here])


@pytest.mark.parametrize("name, attn, batch", KINDS)
def test_changes_of_several_layers_leave_together(name, attn, batch):
    """Entries before and inside of blocks, rows in the order of their layers, against a whole pass for each."""
    model, batch, rows = build(name, attn), BATCHES[batch], torch.arange(4)
    a = anatomy_of(model)
    logits, _ = run(model, batch)
    kept = record(model, batch)
    width = batch.ids.shape[1]
    entries, edits = [], []
    for layer in (0, 1, 2, 3):
        site = f"resid_pre.{layer}" if layer < 3 else "resid_post.2"
        values = [kept.stream[layer][:, START:] + noise((4, width - START, 32), 10 * layer + i) for i in range(2)]
        entries.append(Entry(layer, torch.cat(values)))
        edits += [{site: from_start(value)} for value in values]
        if layer < 3 and name not in PARALLEL:
            added = kept.attn_out[layer][:, START:] + noise((4, width - START, 32), 7 + layer)
            entries.append(Entry(layer, added, "mid"))
            edits.append({f"attn_out.{layer}": from_start(added)})
    entries = entries[::-1]  # in any order: they come out by layer
    with unchanged(model), torch.no_grad():
        ends = resume.finish(kept, entries, START)
        whole = resume.finish(kept, entries, START, everywhere=True)
        found = a.logits(a.final_norm(ends)).view(-1, 4, 60)
        every = a.logits(a.final_norm(whole)).view(-1, 4, width - START, 60)
        assert len(found) == len(edits)
        for group, everywhere, change in zip(found, every, edits, strict=True):
            wanted, _ = run(model, batch, edits=change)
            short = batch.last < START
            near(group[~short], wanted[rows, batch.last][~short])
            near(group[short], logits[rows, batch.last][short])  # over before anything changes
            here = batch.mask[:, START:]
            near(everywhere[here], wanted[:, START:][here])


def test_portions_make_no_difference(monkeypatch):
    model = build("llama_gqa")
    kept = record(model, PADDED)
    entries = [Entry(1, kept.stream[1].repeat(5, 1, 1) + noise((20, 9, 32))), Entry(2, kept.attn_out[2] + 1, "mid")]
    with torch.no_grad():
        wanted = resume.finish(kept, entries, 0)
        monkeypatch.setattr(resume, "TOKENS", 1)  # one group at a time, at least
        near(resume.finish(kept, entries, 0), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_heads_and_neurons_write(name):
    model = build(name, "eager")
    a, kept = anatomy_of(model), record(model, PLAIN, ["z.1", "q.1", "k.1", "v.1"])
    with unchanged(model), torch.no_grad():
        for site in ("q", "k", "v", "pattern"):
            _, seen = run(model, PLAIN, [f"{site}.1"])
            old = seen[f"{site}.1"]
            new = noise(old.shape) if site != "pattern" else noise(old.shape).softmax(-1)
            cut = new[:, :, START:] if site == "pattern" else new[:, START:]
            edited = (
                (lambda x, n=new: torch.cat([x[:, :, :START], n[:, :, START:]], 2))
                if site == "pattern"
                else from_start(cut)
            )
            _, seen = run(model, PLAIN, ["z.1"], edits={f"{site}.1": edited})
            near(resume.attended(kept, 1, site, cut, START), seen["z.1"][:, START:])
        dz = noise((4, 9, 4, a.d_head))
        found = resume.written_by_heads(a, 1, dz, [0, 3, 2])
        out = a.out(1)
        for made, head in zip(found, [0, 3, 2], strict=True):
            alone = torch.zeros_like(dz)
            alone[:, :, head] = dz[:, :, head]
            near(made, out(alone.flatten(2)) - out(torch.zeros(1, 1, a.d_head * 4)))
        if a.missing("mlp_post") is None:
            difference, down = noise((4, 9, a.d_mlp())), a.down(1)
            for made, neuron in zip(resume.written_by_neurons(a, 1, difference, [5, 1]), [5, 1], strict=True):
                alone = torch.zeros_like(difference)
                alone[:, :, neuron] = difference[:, :, neuron]
                near(made, down(alone) - down(torch.zeros(1, 1, a.d_mlp())))


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox", "phi3", "gemma2", "falcon_new", "opt", "mistral"])
def test_bf16(name):
    """Within 2e-2 of the logits' scale."""
    model = build(name, dtype=torch.bfloat16)
    a, kept = anatomy_of(model), record(model, PADDED)
    value = kept.stream[1][:, START:] + noise((4, 9 - START, 32)).bfloat16()
    wanted, _ = run(model, PADDED, edits={"resid_pre.1": from_start(value)})
    with torch.no_grad():
        found = a.logits(a.final_norm(resume.finish(kept, [Entry(1, value)], START)))
    long = PADDED.last >= START
    near(found[long].float(), wanted[torch.arange(4), PADDED.last][long].float(), 2e-2)


def test_one_prompt_one_token_one_column():
    model = build("llama_gqa")
    a = anatomy_of(model)
    for ids in (CORRUPT[:1], CORRUPT[:1, :1], CORRUPT[:3, :1]):
        kept, end = record(model, ids), ids.shape[1] - 1
        value = kept.stream[1][:, end:] + 1
        with torch.no_grad():
            found = a.logits(
                a.final_norm(resume.finish(kept, [Entry(1, value), Entry(2, kept.stream[2][:, end:])], end))
            )
        near(found[: len(ids)], run(model, ids, edits={"resid_pre.1@-1": lambda x: x + 1})[0][:, -1])
        near(found[len(ids) :], run(model, ids)[0][:, -1])


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gpt_neox"])
def test_a_head_that_reads_gradients_can_be_taken_up_too(name):
    model = build(name)
    a, kept = anatomy_of(model), record(model, PADDED)
    value = kept.stream[1].clone().requires_grad_()
    a.logits(a.final_norm(resume.finish(kept, [Entry(1, value)], 0)))[:, 5].sum().backward()
    with capture(model, ["resid_pre.1"], grad=True) as seen:
        logits = model(**PADDED.inputs(model)).logits
    (wanted,) = torch.autograd.grad(logits[torch.arange(4), PADDED.last, 5].sum(), seen["resid_pre.1"])
    near(value.grad[PADDED.mask], wanted[PADDED.mask])


def test_left_padding_and_models_without_a_cache_are_refused(monkeypatch):
    model = disturbed(build("gpt2"))
    with unchanged(model):
        with pytest.raises(SurgeryError, match=r"(?s)padded on the left can't be taken up.*side='right'"):
            record(model, encode(None, ROWS, side="left"))
        monkeypatch.setattr(recording, "cache_name", lambda model: None)
        with pytest.raises(SurgeryError, match="(?s)GPT2LMHeadModel takes no cache.*reuse=False"):
            record(model, PLAIN)


def test_an_exception_while_a_block_runs_leaves_the_model_as_it_was():
    model = disturbed(build("gpt2"))
    kept = record(model, PLAIN)
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with unchanged(model):
        for at in ("pre", "mid"):
            with pytest.raises(ZeroDivisionError):
                resume.finish(kept, [Entry(1, kept.stream[1], at)], 0)
        with pytest.raises(RuntimeError):
            resume.attended(kept, 1, "q", torch.zeros(3, 5, 7))
    handle.remove()


def test_edits_of_places_that_a_block_by_itself_can_not_know_are_refused():
    """Hooks that stand run along: right where they say nothing of tokens, refused where other tokens run."""
    model = build("llama_gqa")
    a = anatomy_of(model)
    with torch.no_grad(), edit(model, {"mlp_out.1": lambda x: 2 * x}):
        kept = record(model, PLAIN)
        found = resume.finish(kept, [Entry(1, kept.stream[1][:, START:] + 1)], START)
        wanted, _ = run(model, PLAIN, edits={"resid_pre.1": lambda x: torch.cat([x[:, :START], x[:, START:] + 1], 1)})
    near(a.logits(a.final_norm(found)), wanted[:, -1])
    for change in ({"mlp_out.1@-1": 0.0}, {"mlp_out.1": lambda x, call: x + call.positions[..., None]}):
        with torch.no_grad(), edit(model, change):
            kept = record(model, PLAIN)
            with pytest.raises(SurgeryError, match="A part of the model was called by itself"):
                resume.finish(kept, [Entry(1, kept.stream[1][:, START:] + 1)], START)
            with pytest.raises(SurgeryError, match="A part of the model was called by itself"):
                resume.last_token(kept, 1, kept.stream[1])
