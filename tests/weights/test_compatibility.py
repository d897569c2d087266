"""The check before a merge: every kind of mismatch is found, told, and graded."""

import io
import json
import math

import pytest
import torch
from helpers import (
    load_state,
    read_json,
    save_checkpoint,
    tiny_checkpoint,
    tiny_family,
    tiny_tokenizer,
    words,
    write_json,
)

from surgery.checkpoint import TensorInfo, open_checkpoint
from surgery.errors import SurgeryError
from surgery.weights import compatibility
from surgery.weights.ancestry import ancestry, sanity
from surgery.weights.findings import CompatibilityReport, Finding


def found(findings, level, what):
    return [f for f in findings if (f.level, f.what) == (level, what)]


def compare(base, *others):
    return compatibility.compare(open_checkpoint(base), [open_checkpoint(o) for o in others])


def change(folder, tensors=None, **config):
    """Rewrites a checkpoint with other tensors or other config fields."""
    settings = read_json(folder / "config.json") | config
    return save_checkpoint(folder, load_state(folder) if tensors is None else tensors, settings)


@pytest.fixture
def pair(tmp_path):
    base, (tuned,) = tiny_family(tmp_path, 1)
    return base, tuned


class Deltas:
    """A vector in memory."""

    def __init__(self, deltas):
        self.deltas = deltas
        self.tensors = {n: TensorInfo(n, "F32", tuple(d.shape)) for n, d in deltas.items()}

    def read(self, name, start=0, stop=None):
        return self.deltas[name][start:stop]


def test_a_family_passes(tmp_path):
    base, tuned = tiny_family(tmp_path, 2, dtype="bfloat16")
    report = compatibility.check(open_checkpoint(base), [open_checkpoint(t) for t in tuned])
    assert report.ok and report.exit_code == 0 and not report.warnings, report.findings
    assert {f.what for f in report.findings} >= {"config", "tensors", "tokenizer", "ancestry"}
    assert set(report.measures) == {"tuned0", "tuned1"}
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("field", "value", "level", "said"),
    [
        ("model_type", "qwen2", "fail", "model_type is 'qwen2', the base has 'llama'"),
        ("num_attention_heads", 4, "fail", "heads is 4, the base has 2"),
        ("rope_theta", 500000.0, "warn", "rope_theta 500000.0 (base 10000.0)"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "warn", "rope_type 'linear' (base 'default')"),
        ("max_position_embeddings", 128, "warn", "context length is 128"),
    ],
)
def test_config_fields(pair, field, value, level, said):
    base, tuned = pair
    change(tuned, **{field: value})
    assert any(said in f.detail for f in found(compare(base, tuned), level, "config"))


def test_rope_spelled_in_two_ways_is_equal(pair):
    base, tuned = pair
    config = read_json(tuned / "config.json")
    del config["rope_theta"]
    write_json(tuned / "config.json", config | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})
    assert not found(compare(base, tuned), "warn", "config")


def test_all_missing_extra_and_misshapen_tensors_at_once(pair):
    base, tuned = pair
    tensors = load_state(tuned)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(4, 16)
    change(tuned, tensors)
    findings = compare(base, tuned)
    names = [f.tensors for f in found(findings, "fail", "tensor names")]
    assert names == [
        ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"),
        ("model.layers.0.self_attn.q_proj.bias",),
    ]
    (shapes,) = found(findings, "fail", "shapes")
    assert "k_proj.weight [4, 16] (base [8, 16])" in shapes.detail


def test_a_longer_vocabulary_is_told_as_such(tmp_path, pair):
    other = tiny_checkpoint(tmp_path / "longer", vocab=44)
    (shapes,) = found(compare(pair[0], other), "fail", "shapes")
    assert set(shapes.tensors) == {"model.embed_tokens.weight", "lm_head.weight"} and "vocabulary" in shapes.hint


def test_derived_buffers_only_warn(pair):
    base, tuned = pair
    change(tuned, load_state(tuned) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    findings = compare(base, tuned)
    assert found(findings, "warn", "tensor names") and not found(findings, "fail", "tensor names")


def test_names_that_differ_by_a_prefix(pair):
    base, tuned = pair
    change(tuned, {"language_model." + n: t for n, t in load_state(tuned).items()})
    findings = compare(base, tuned)
    assert all("'language_model.'" in f.hint for f in found(findings, "fail", "tensor names") if f.tensors)
    assert any("no tensor in common" in f.detail for f in findings)


def test_heads_tied_here_and_not_there(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", tied=True)
    own = tiny_checkpoint(tmp_path / "own", tied=False)
    findings = compare(base, own)
    assert "own has its own head, the base a head tied" in found(findings, "warn", "head")[0].detail
    assert not found(findings, "fail", "tensor names")
    ignored = change(own, tie_word_embeddings=True)
    assert any("transformers ignores it" in f.detail for f in found(compare(base, ignored), "warn", "head"))


def test_integer_buffers(pair):
    base, tuned = pair
    change(base, load_state(base) | {"mask": torch.arange(6)})
    change(tuned, load_state(tuned) | {"mask": torch.arange(6)})
    assert found(compare(base, tuned), "pass", "buffers")
    change(tuned, load_state(tuned) | {"mask": torch.arange(6).flip(0)})
    assert found(compare(base, tuned), "fail", "buffers")[0].tensors == ("mask",)


def test_other_types_warn_and_codes_fail(pair):
    base, tuned = pair
    tensors = {n: t.bfloat16() for n, t in load_state(tuned).items()}
    tensors["model.norm.weight"] = torch.ones(16, dtype=torch.int8)
    change(tuned, tensors)
    findings = compare(base, tuned)
    assert "BF16 (base F32)" in found(findings, "warn", "types")[0].detail
    assert found(findings, "fail", "types")[0].tensors == ("model.norm.weight",)


def test_vocabularies(tmp_path, pair):
    base, tuned = pair
    assert found(compare(base, tuned), "pass", "tokenizer")
    tokens = words(40)
    tiny_tokenizer(tuned, [*tokens[:-2], tokens[-1], tokens[-2]])
    assert found(compare(base, tuned), "fail", "tokenizer")
    tiny_tokenizer(tuned, tokens)
    settings = read_json(tuned / "tokenizer_config.json")
    write_json(tuned / "tokenizer_config.json", settings | {"eos_token": "<pad>"})
    assert "<pad>" in found(compare(base, tuned), "warn", "tokenizer")[0].detail
    (tuned / "tokenizer.json").unlink()
    assert "not compared" in found(compare(base, tuned), "warn", "tokenizer")[0].detail


def test_the_same_folder(pair):
    base, tuned = pair
    assert "base itself" in found(compare(base, base), "fail", "inputs")[0].detail
    assert "more than once" in found(compare(base, tuned, tuned), "warn", "inputs")[0].detail


def test_nothing_to_compare(pair):
    with pytest.raises(SurgeryError, match="Nothing was given"):
        compare(pair[0])


def test_ancestry_measures_what_it_says(pair):
    base, tuned = map(open_checkpoint, pair)
    related = ancestry(base, tuned)
    for name, b in load_state(pair[0]).items():
        b, f = b.double().flatten(), load_state(pair[1])[name].double().flatten()
        assert related.ratio[name] == pytest.approx(((f - b).norm() / b.norm()).item(), rel=1e-6)
        assert related.cosine[name] == pytest.approx((b @ f / b.norm() / f.norm()).item(), rel=1e-6)
    assert related == ancestry(base, tuned, threads=3)
    assert [f.level for f in related.findings()] == ["pass"]


def test_another_initialisation_fails_and_a_far_one_warns(tmp_path, pair):
    base = open_checkpoint(pair[0])
    stranger = open_checkpoint(tiny_checkpoint(tmp_path / "stranger", seed=9))
    (finding,) = ancestry(base, stranger).findings()
    assert finding.level == "fail" and "another initialisation" in finding.detail
    far = open_checkpoint(tiny_checkpoint(tmp_path / "far", seed=9, near=pair[0], delta=0.04))
    assert [f.level for f in ancestry(base, far).findings()] == ["warn"]
    same = open_checkpoint(save_checkpoint(tmp_path / "same", load_state(pair[0]), read_json(pair[0] / "config.json")))
    assert "equals the base" in ancestry(base, same).findings()[0].detail


def test_a_sample_is_enough_to_tell_strangers(tmp_path):
    base, (tuned,) = tiny_family(tmp_path, 1, hidden=64)
    stranger = tiny_checkpoint(tmp_path / "stranger", seed=9, hidden=64)
    base, tuned, stranger = map(open_checkpoint, (base, tuned, stranger))
    near, far = ancestry(base, tuned, sample=1024), ancestry(base, stranger, sample=1024)
    assert near.median_cosine > 0.9 and abs(far.median_cosine) < 0.3
    assert near.ratio != ancestry(base, tuned).ratio


def test_nan_and_inf_are_counted_with_their_tensor(pair):
    base, tuned = pair
    tensors = load_state(tuned)
    tensors["lm_head.weight"][3, :5] = math.nan
    tensors["model.norm.weight"][0] = math.inf
    change(tuned, tensors)
    related = ancestry(*map(open_checkpoint, pair))
    assert related.nonfinite == {"lm_head.weight": 5, "model.norm.weight": 1}
    finding = related.findings()[0]
    assert finding.level == "fail" and "6 NaN or infinite" in finding.detail and "lm_head.weight (5)" in finding.detail


def test_sanity_of_a_vector_and_its_rounding(tmp_path):
    target = open_checkpoint(tiny_checkpoint(tmp_path / "base", dtype="bfloat16"))
    weights = {n: t.float() for n, t in load_state(tmp_path / "base").items()}
    deltas = {n: 1e-5 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in weights.items()}
    deltas["lm_head.weight"][::2] = 0
    looked = sanity(Deltas(deltas), target)
    d = torch.cat([x.flatten() for x in deltas.values()])
    t = torch.cat([weights[n].flatten() for n in deltas])
    rounded = (t + d).bfloat16().float()
    assert looked.zeros == pytest.approx((d == 0).float().mean().item())
    assert looked.rounding == pytest.approx(((rounded - (t + d)).norm() / d.norm()).item(), rel=1e-5)
    assert looked.vanished == pytest.approx(((rounded == t) & (d != 0)).sum().item() / (d != 0).sum().item())
    assert [f.level for f in looked.findings()] == ["pass", "warn"]
    assert sanity(Deltas(deltas), target, dtype="F32").rounding < 0.01
    assert sanity(Deltas(deltas)).rounding is None
    deltas["model.norm.weight"][2] = math.nan
    assert sanity(Deltas(deltas), target).nonfinite == {"model.norm.weight": 1}
    assert sanity(Deltas({"a": torch.zeros(3)})).findings()[0].level == "warn"


def test_the_report_refuses_tells_and_draws():
    report = CompatibilityReport(
        [Finding("warn", "head", "tied here"), Finding("fail", "shapes", "[2] not [3]", "Fix.")]
    )
    assert (report.ok, report.exit_code) == (False, 1)
    with pytest.raises(SurgeryError, match=r"shapes: \[2\] not \[3\]") as caught:
        report.require()
    assert caught.value.hint == "Fix."
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(report.table())
    text = " ".join(console.file.getvalue().split())
    assert "✗ fail" in text and "[2] not [3]" in text and "not compatible: 1 failed, 1" in text
