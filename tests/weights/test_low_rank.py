"""Low rank: the randomised SVD, energy and budgets, adapters in and out, and what PEFT makes of them."""

import json

import pytest
import torch
from helpers import load_state, read_json, real_llama, save_checkpoint, tiny_config, tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.weights import low_rank
from surgery.weights.low_rank import decompose, truncate
from surgery.weights.vector import TaskVector


def matrix(m, n, values, seed=0):
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(values), generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=torch.float64)).Q
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.T).float()


def error(d, found):
    return float((d.double() - found.left.double() @ found.right.double()).norm() / d.double().norm())


@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (90, 90)])
def test_randomised_is_near_the_best(shape):
    values = [1 / (i + 1) for i in range(80)]
    d = matrix(*shape, values)
    found = decompose(lambda a, b: d[a:b], *shape, rank=8)
    exact = torch.linalg.svdvals(d.double())
    best = float(exact[8:].square().sum().sqrt() / exact.norm())
    assert found.rank == 8 and error(d, found) <= 1.01 * best
    torch.testing.assert_close(found.values.double(), exact[:8], rtol=2e-3, atol=0)
    assert found.captured == pytest.approx(float(exact[:8].square().sum() / exact.square().sum()), rel=2e-3)
    assert found.norm == pytest.approx(float(exact.norm()), rel=1e-5)


def test_exact_low_rank_is_found_exactly():
    d = matrix(150, 100, [3.0, 2.0, 0.5])
    found = decompose(lambda a, b: d[a:b], 150, 100, rank=3)
    assert error(d, found) < 1e-5 and found.captured == pytest.approx(1, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(1, 80), st.integers(0, 3))
def test_captured_is_what_the_product_leaves(m, n, rank, seed):
    d = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    found = decompose(lambda a, b: d[a:b], m, n, rank=rank)
    assert found.rank == min(rank, m, n)
    assert found.captured == pytest.approx(1 - error(d, found) ** 2, abs=2e-3)


def test_streaming_and_repeating_change_nothing(monkeypatch):
    d = matrix(130, 140, [1 / (i + 1) for i in range(60)])
    once = decompose(lambda a, b: d[a:b], 130, 140, rank=5, seed=3)
    assert decompose(lambda a, b: d[a:b], 130, 140, rank=5, seed=3).left.equal(once.left)
    monkeypatch.setattr(low_rank, "WORK", 700)
    blocks = decompose(lambda a, b: d[a:b], 130, 140, rank=5, seed=3)
    torch.testing.assert_close(blocks.left @ blocks.right, once.left @ once.right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_rank_by_energy(energy):
    d = matrix(100, 160, [0.8**i for i in range(60)])
    found = decompose(lambda a, b: d[a:b], 100, 160, energy=energy)
    assert found.captured >= energy - 1e-4
    if found.rank > 1 and energy < 1:
        assert found.first(found.rank - 1).captured < energy


def test_a_product_is_cut_without_being_made():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(80, 6, generator=g), torch.randn(6, 50, generator=g)
    exact = torch.linalg.svdvals((left @ right).double())
    found = truncate(left, right)
    assert found.rank == 6 and error(left @ right, found) < 1e-6
    small = truncate(left, right, rank=2)
    torch.testing.assert_close(small.values.double(), exact[:2], rtol=1e-5, atol=0)
    assert small.captured == pytest.approx(float(exact[:2].square().sum() / exact.square().sum()), rel=1e-5)
    assert truncate(torch.cat([left, left], 1), torch.cat([right, right])).rank == 6


def test_nonsense_is_refused():
    for wrong in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(SurgeryError):
            decompose(lambda a, b: torch.ones(b - a, 4), 4, 4, **wrong)


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    base, tuned = tiny_family(tmp_path_factory.mktemp("family"), 1)
    return TaskVector.between(base, tuned[0])


def test_low_rank_vectors(vector, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    low = vector.low_rank(3)
    assert torch.linalg.matrix_rank(low.tensor(name)) == 3
    u, s, v = torch.linalg.svd(vector.tensor(name))
    torch.testing.assert_close(low.tensor(name), (u[:, :3] * s[:3]) @ v[:3], rtol=0, atol=1e-5)
    assert low.tensor("model.norm.weight").equal(vector.tensor("model.norm.weight"))
    assert low.read(name, 5, 9).equal(low.tensor(name)[5:9])
    assert low.expression.decomposed(name).captured == pytest.approx(float(s[:3].square().sum() / s.square().sum()))
    assert "low_rank(rank=3)" in str(low)
    assert vector.low_rank(energy=0.9).expression.decomposed(name).captured >= 0.9
    with pytest.raises(SurgeryError):
        vector.low_rank()
    low.save(tmp_path / "v.safetensors", "low_rank", rank=3, dtype="float32")
    torch.testing.assert_close(
        TaskVector.load(tmp_path / "v.safetensors").tensor(name), low.tensor(name), rtol=0, atol=1e-6
    )


# --- adapters, alone and against PEFT --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = real_llama(folder / "base")
    g = torch.Generator().manual_seed(1)
    state = {n: t + 0.02 * torch.randn(t.shape, generator=g) for n, t in load_state(base).items()}
    return base, save_checkpoint(folder / "tuned", state, tiny_config())


def test_exported_and_imported_again(models, tmp_path):
    base, tuned = models
    vector = TaskVector.between(base, tuned)
    done = vector.export_lora(tmp_path / "lora", rank=4)
    back = TaskVector.from_adapter(base, tmp_path / "lora")
    low = vector.low_rank(4)
    assert set(done.ranks.values()) == {4} and done.left_out == []
    assert set(back.names) == set(vector.names)
    for name in vector.names:
        exact = low.tensor(name) if name in done.ranks else vector.tensor(name)
        torch.testing.assert_close(back.tensor(name), exact, rtol=0, atol=1e-6)
        assert back.read(name, 1, 7).equal(back.tensor(name)[1:7])
    assert 0.3 < done.energy < 1
    assert done.parameters == sum(t.numel() for n, t in load_file(tmp_path / "lora/adapter_model.safetensors").items()
                                  if "lora_" in n)  # fmt: skip


def test_ranks_by_energy_and_budget(models, tmp_path):
    base, tuned = models
    vector = TaskVector.between(base, tuned).scaled(per_module={"q_proj": 10.0, "mlp": 0.1}).only("proj")
    done = vector.export_lora(tmp_path / "energy", energy=0.8)
    assert min(done.captured.values()) >= 0.8 - 1e-6 and len(set(done.ranks.values())) > 1
    config = read_json(tmp_path / "energy" / "adapter_config.json")
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    back = TaskVector.from_adapter(base, tmp_path / "energy")
    for name, share in done.captured.items():
        lost = (back.tensor(name) - vector.tensor(name)).norm() / vector.tensor(name).norm()
        assert 1 - float(lost) ** 2 == pytest.approx(share, abs=1e-4)
    spent = vector.export_lora(tmp_path / "budget", budget=600)
    assert 500 < spent.parameters <= 600
    assert all(spent.ranks.get(n, 0) > 0 for n in vector.names if "q_proj" in n)
    assert not any("mlp" in n for n in spent.ranks)
    with pytest.raises(SurgeryError, match="not enough"):
        vector.export_lora(tmp_path / "none", budget=3)
    with pytest.raises(SurgeryError, match="one of"):
        vector.export_lora(tmp_path / "none", rank=3, budget=3)
    with pytest.raises(SurgeryError, match="not known to be of low rank"):
        vector.export_lora(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_left_out_is_said(models, tmp_path):
    base, tuned = models
    done = TaskVector.between(base, tuned).export_lora(tmp_path / "lora", rank=2, whole=False)
    assert done.whole == [] and len(done.left_out) == 5 and all("norm" in n for n in done.left_out)
    with pytest.raises(SurgeryError, match="No matrix"):
        TaskVector.between(base, tuned).only("norm").export_lora(tmp_path / "norms", rank=2)


@pytest.mark.peers
def test_peft_loads_what_is_exported_and_merges_to_the_same(models, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, tuned = models
    vector = TaskVector.between(base, tuned)
    for options in ({"rank": 4}, {"energy": 0.9}):
        out = tmp_path / str(options)
        done = vector.export_lora(out, **options)
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        missing = [n for n, p in model.named_parameters() if ("lora_" in n) and not p.any()]
        assert missing == []
        merged = model.merge_and_unload().state_dict()
        expected = TaskVector.from_adapter(base, out)
        for name, before in load_state(base).items():
            torch.testing.assert_close(merged[name], before + expected.tensor(name), rtol=0, atol=2e-6)
            if name in done.ranks:
                low = vector.expression.whole(name)
                u, s, v = torch.linalg.svd(low)
                r = done.ranks[name]
                torch.testing.assert_close(merged[name], before + (u[:, :r] * s[:r]) @ v[:r], rtol=0, atol=1e-5)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_a_tied_model_stays_tied(tmp_path, recwarn):
    """Switched on and merged, in PEFT and read back by us: the same embedding on both sides of the tie."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, (tuned,) = tiny_family(tmp_path, 1, tied=True, delta=0.05)
    vector = TaskVector.between(base, tuned)
    done = vector.export_lora(tmp_path / "lora", rank=3)
    embedding = "model.embed_tokens.weight"
    assert embedding in done.whole and embedding not in done.ranks and not done.left_out
    back = open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    assert back.config["tie_word_embeddings"] and "lm_head.weight" not in back.tensors
    torch.testing.assert_close(back.read(embedding), load_state(tuned)[embedding], rtol=0, atol=1e-6)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        on = loaded.eval()(tokens).logits
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, on, rtol=1e-4, atol=1e-5)
    state, before, low = merged.state_dict(), load_state(base), vector.low_rank(3)
    for name in done.ranks:
        torch.testing.assert_close(state[name], before[name] + low.tensor(name), rtol=0, atol=1e-5)
    for name in (embedding, "lm_head.weight"):
        torch.testing.assert_close(state[name], load_state(tuned)[embedding], rtol=0, atol=1e-6)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits, on)
    assert not [w for w in recwarn if "tie" in str(w.message)]


def test_the_embedding_of_a_tied_model_is_kept_whole_or_left_out(tmp_path):
    base, (tuned,) = tiny_family(tmp_path, 1, tied=True, delta=0.05)
    vector = TaskVector.between(base, tuned)
    embedding = "model.embed_tokens.weight"
    assert embedding in vector.export_lora(tmp_path / "a", rank=3, whole=False).left_out
    vector.save(tmp_path / "v.safetensors")
    stored = TaskVector.load(tmp_path / "v.safetensors")  # nobody knows whether its base ties
    assert embedding in stored.export_lora(tmp_path / "b", rank=3).left_out
    assert embedding in stored.bound(base).export_lora(tmp_path / "c", rank=3).whole
    assert not vector.only("mlp").export_lora(tmp_path / "d", rank=3).whole


def test_a_head_that_moves_apart_is_not_tied(tmp_path):
    base = tiny_family(tmp_path, 0, tied=True)[0]
    state = load_state(base)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + torch.randn(40, 16)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] + torch.randn(40, 16)
    tuned = save_checkpoint(tmp_path / "tuned", state, tiny_config())
    vector = TaskVector.between(base, tuned)
    vector.export_lora(tmp_path / "lora", rank=16)
    back = TaskVector.from_adapter(base, tmp_path / "lora")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(back.tensor(name), vector.tensor(name), rtol=0, atol=1e-5)


@pytest.mark.peers
def test_gpt2_with_its_matrices_the_other_way_round(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "base")
    names = set(load_state(tmp_path / "base"))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "tuned")
    vector = TaskVector.between(tmp_path / "base", tmp_path / "tuned")
    done = vector.export_lora(tmp_path / "lora", rank=5)
    assert all(".bias" in n for n in done.left_out) and "transformer.wte.weight" in done.whole
    assert "lm_head.weight" not in TaskVector.from_adapter(tmp_path / "base", tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    merged = loaded.merge_and_unload().state_dict()
    low, before = vector.low_rank(5), load_state(tmp_path / "base")
    prefix = "" if next(iter(names)).startswith("transformer") else "transformer."
    for name in done.ranks:
        found = merged[prefix + name]
        torch.testing.assert_close(found, before[name] + low.tensor(name), rtol=0, atol=1e-5)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        torch.testing.assert_close(merged[name], load_state(tmp_path / "tuned")["transformer.wte.weight"])


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """Two PEFT adapters of other ranks and scales on the same modules, as PEFT saves them."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    for i, (rank, alpha, rslora) in enumerate([(3, 6, False), (4, 5, True)]):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models[0]), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(0.1 * torch.randn_like(p))
        model.save_pretrained(folder / f"a{i}")
    return folder / "a0", folder / "a1"


def peft_combined(models, adapters, weights, **options):
    """The weights of PEFT's own combination, merged into the base, minus the base."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[0])
    model = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    model.load_adapter(adapters[1], adapter_name="a1")
    model.add_weighted_adapter(["a0", "a1"], weights, "both", **options)
    model.set_adapter("both")
    merged = model.merge_and_unload().state_dict()
    return {n: merged[n] - before for n, before in load_state(models[0]).items()}


@pytest.mark.peers
def test_cat_is_the_sum(models, adapters, tmp_path):
    a, b = (TaskVector.from_adapter(models[0], folder) for folder in adapters)
    both = 0.7 * a - 0.4 * b
    done = both.export_lora(tmp_path / "cat")
    assert set(done.ranks.values()) == {7} and min(done.captured.values()) == pytest.approx(1, abs=1e-6)
    peers = peft_combined(models, adapters, [0.7, 1.0], combination_type="cat")
    ours = 0.7 * a + b
    back = TaskVector.from_adapter(models[0], tmp_path / "cat")
    for name in both.names:
        torch.testing.assert_close(ours.tensor(name), peers[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(back.tensor(name), both.tensor(name), rtol=0, atol=1e-6)


@pytest.mark.peers
def test_svd_is_the_recompression(models, adapters, tmp_path):
    a, b = (TaskVector.from_adapter(models[0], folder) for folder in adapters)
    both = 0.7 * a + 1.3 * b
    both.export_lora(tmp_path / "svd", rank=4)
    ours = TaskVector.from_adapter(models[0], tmp_path / "svd")
    peers = peft_combined(models, adapters, [0.7, 1.3], combination_type="svd", svd_rank=4)
    for name in both.names:
        torch.testing.assert_close(ours.tensor(name), peers[name], rtol=0, atol=2e-6)


@pytest.mark.peers
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_ties_svd(models, adapters, tmp_path, election):
    a, b = (TaskVector.from_adapter(models[0], folder) for folder in adapters)
    words = {"election": "unweighted" if election == "total" else "frequency", "normalize": "count"}
    both = TaskVector.merged([a, b], "ties", weight=[0.7, 1.3], density=0.5, **words)
    both.export_lora(tmp_path / "ties", rank=4)
    ours = TaskVector.from_adapter(models[0], tmp_path / "ties")
    peers = peft_combined(models, adapters, [0.7, 1.3], combination_type="ties_svd", svd_rank=4, density=0.5,
                          majority_sign_method=election)  # fmt: skip
    for name in both.names:
        torch.testing.assert_close(ours.tensor(name), peers[name], rtol=0, atol=2e-6)


@pytest.mark.peers
def test_an_adapter_is_never_made_dense(models, adapters, monkeypatch, tmp_path):
    a, b = (TaskVector.from_adapter(models[0], folder) for folder in adapters)

    def refuse(*_):
        raise AssertionError("made dense")

    monkeypatch.setattr(low_rank, "decompose", refuse)
    done = (2 * (a + b)).scaled(gradient=[0, 1]).only("down_proj").export_lora(tmp_path / "out", rank=2)
    assert done.energy > 0.3
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
