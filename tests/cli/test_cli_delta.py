"""`surgery delta`: extract, apply, overlap, convert; and deltas where `surgery vector` takes vectors."""

import json

import pytest
import torch

from surgery.cli import main
from tests.cli.refusal import refused
from tests.helpers import load_state, read_json, same_bits, save_checkpoint, tiny_checkpoint

torch.set_num_threads(1)


@pytest.fixture
def family(tmp_path):
    """A base, and two fine-tunings in which a twentieth of the numbers moved."""
    base = tiny_checkpoint(tmp_path / "base", dtype="bfloat16")
    folders = [str(base)]
    for i in range(2):
        g = torch.Generator().manual_seed(i)
        state = load_state(base)
        for name, tensor in state.items():
            state[name] = torch.where(torch.rand(tensor.shape, generator=g) < 0.05, tensor + 2**-6, tensor)
        folders.append(str(save_checkpoint(tmp_path / f"tuned{i}", state, read_json(base / "config.json"))))
    return folders


@pytest.fixture
def deltas(family, tmp_path):
    out = [str(tmp_path / f"d{i}.safetensors") for i in range(2)]
    for tuned, path in zip(family[1:], out, strict=True):
        assert main(["delta", "extract", family[0], tuned, "-o", path, "--quiet"]) == 0
    return out


def test_extract_apply_and_the_way_back(family, tmp_path, capsys):
    base, tuned, _ = family
    delta, out, undo = (str(tmp_path / name) for name in ("d.safetensors", "out", "undo.safetensors"))
    assert main(["delta", "extract", base, tuned, "-o", delta, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["mode"] == "set" and 0.03 < told["density"] < 0.08 and told["bytes"] == (tmp_path / delta).stat().st_size
    )
    assert main(["delta", "apply", base, delta, "-o", out, "--undo", undo]) == 0
    assert undo in capsys.readouterr().out and same_bits(load_state(out), load_state(tuned))
    assert main(["delta", "apply", out, undo, "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert same_bits(load_state(tmp_path / "again"), load_state(base))


def test_a_share_of_the_largest_changes_and_some_tensors_only(family, tmp_path, capsys):
    delta = str(tmp_path / "d.safetensors")
    words = ["--density", "0.01", "--only", "mlp", "--without", "down_proj", "--mode", "add", "--dtype", "bfloat16"]
    assert main(["delta", "extract", *family[:2], "-o", delta, *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tensors"] == 4 and told["count"] == 4 * 5  # int(0.01 * 512) of each matrix
    names = load_state(delta)
    assert all("gate_proj" in n or "up_proj" in n for n in names)
    assert {t.dtype for n, t in names.items() if n.endswith(".val")} == {torch.bfloat16}


def test_the_sum_of_several_in_any_order(family, deltas, tmp_path):
    for out, order in (("ab", deltas), ("ba", deltas[::-1])):
        assert main(["delta", "apply", family[0], *order, "-o", str(tmp_path / out), "--quiet"]) == 0
    states = [load_state(folder) for folder in family]
    made = load_state(tmp_path / "ab")
    assert same_bits(made, load_state(tmp_path / "ba"))
    for name, tensor in made.items():
        base, a, b = (state[name].float() for state in states)
        assert tensor.equal((base + (a - base) + (b - base)).bfloat16())


def test_overlap_tells_and_draws(family, deltas, tmp_path, capsys):
    figure = tmp_path / "overlap.png"
    words = ["delta", "overlap", *deltas, "--base", family[0], "--plot", str(figure)]
    assert main([*words, "--by", "tensor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    pair = told["pairs"][0]
    assert told["labels"] == ["d0", "d1"] and pair["overlap"] == pair["common"] / min(pair["count_a"], pair["count_b"])
    assert pair["agreement"] == 1.0 and sum(row["common"] for row in told["tensors"]) == pair["common"]
    assert figure.stat().st_size > 5_000
    assert main(words) == 0
    assert "the same way" in capsys.readouterr().out
    assert main(["delta", "overlap", *deltas]) == 0
    assert "--base BASE" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["shira", "supertuning", "lt-sft"])
def test_convert_to_a_peers_format_and_back(family, tmp_path, capsys, to):
    delta, there, back = (str(tmp_path / name) for name in ("d.safetensors", "there", "back.safetensors"))
    extract = ["delta", "extract", *family[:2], "-o", delta, "--mode", "add", "--only", "mlp"]
    assert main([*extract, "--quiet"]) == 0
    assert main(["delta", "convert", delta, "-o", there, "--to", to]) == 0
    assert f"Written as {to}" in capsys.readouterr().out
    words = ["--allow-pickle"] if to == "lt-sft" else ["--base", family[0]]
    assert main(["delta", "convert", there, "-o", back, "--to", "delta", *words, "--quiet"]) == 0
    a, b = load_state(delta), load_state(back)
    assert a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)
    if to != "lt-sft":  # an adapter is applied as it is
        assert main(["delta", "apply", family[0], there, "-o", str(tmp_path / "out"), "--quiet"]) == 0


def test_what_is_left_out_is_told(family, deltas, tmp_path, capsys):
    out = str(tmp_path / "a")
    assert main(["delta", "convert", deltas[0], "-o", out, "--to", "supertuning", "--base", family[0]]) == 0
    told = capsys.readouterr()
    assert "model.embed_tokens.weight" in told.err and "filled up with" in told.out


def test_deltas_are_taken_where_vectors_are(family, deltas, tmp_path, capsys):
    base, tuned, _ = family
    out = str(tmp_path / "out")
    assert main(["vector", "apply", deltas[0], base, "-o", out, "--quiet"]) == 0
    assert same_bits(load_state(out), load_state(tuned))
    sum_ = str(tmp_path / "c.safetensors")
    combine = ["vector", "combine", "a + 0.5*b", f"a={deltas[0]}", f"b={deltas[1]}", "-o", sum_]
    assert "--base BASE" in refused(combine, capsys)
    assert main([*combine, "--base", base, "--quiet"]) == 0
    states = [load_state(folder) for folder in family]
    for name, tensor in load_state(sum_).items():
        first, a, b = (state[name].float() for state in states)
        assert torch.allclose(tensor, (a - first) + 0.5 * (b - first), atol=1e-6)
    assert main(["vector", "inspect", *deltas, "--base", base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["d0", "d1"]
    for out, models in (("ours", [f"{base}+{delta}" for delta in deltas]), ("wanted", family[1:])):
        words = ["merge", "--method", "ties", "--base", base, *models, "-o", str(tmp_path / out)]
        assert main([*words, "--quiet"]) == 0
    assert same_bits(load_state(tmp_path / "ours"), load_state(tmp_path / "wanted"))


def test_a_transfer_must_be_asked_for(family, deltas, tmp_path, capsys):
    words = ["delta", "apply", family[2], deltas[0], "-o", str(tmp_path / "out")]
    assert "is not the base" in refused(words, capsys)
    assert "--delta-base" in refused([*words, "--transfer"], capsys)
    assert main([*words, "--transfer", "--delta-base", family[0], "--quiet"]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["extract", "BASE", "BASE", "-o", "OUT"], "same"),
        (["extract", "BASE", "missing", "-o", "OUT"], "missing"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--only", "nowhere"], "nowhere"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--density", "2"], "density"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--dtype", "bfloat16"], "takes no dtype"),
        (["extract", "BASE", "TUNED", "-o", "DELTA"], "--force"),
        (["extract", "BASE", "TUNED", "-o", "folder"], "no name"),
        (["apply", "BASE", "missing", "-o", "OUT"], "no file or folder 'missing'"),
        (["apply", "BASE", "TUNED", "-o", "OUT"], "no sparse delta"),
        (["apply", "BASE", "DELTA", "-o", "OUT", "--scale", "nan"], "scale"),
        (["apply", "BASE", "DELTA", "-o", "OUT", "--undo", "DELTA"], "exists"),
        (["overlap", "DELTA"], "Only one"),
        (["overlap", "DELTA", "missing"], "missing"),
        (["convert", "DELTA", "-o", "OUT", "--to", "shira"], "base is needed"),
        (["convert", "PICKLE", "-o", "OUT", "--to", "delta"], "--allow-pickle"),
        (["convert", "PICKLE", "-o", "OUT", "--to", "delta", "--allow-pickle"], "plain numbers"),
    ],
)
def test_what_can_not_be_done(words, told, family, deltas, tmp_path, capsys):
    pickle = tmp_path / "pytorch_diff.bin"
    pickle.write_bytes(b"nothing")
    places = {"BASE": family[0], "TUNED": family[1], "DELTA": deltas[0], "PICKLE": str(pickle),
              "OUT": str(tmp_path / "out.safetensors")}  # fmt: skip
    assert told in refused(["delta", *(places.get(word, word) for word in words)], capsys)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.real
def test_smollm2_by_the_command(tmp_path, capsys):
    from surgery import zoo

    state = load_state(zoo.get("smollm2"))
    name = "model.layers.3.mlp.up_proj.weight"
    state[name].view(-1)[::20] *= 1.5
    tuned = str(save_checkpoint(tmp_path / "tuned", state, read_json(zoo.get("smollm2") / "config.json")))
    delta, out, undo = (str(tmp_path / n) for n in ("d.safetensors", "out", "undo.safetensors"))
    assert main(["delta", "extract", "smollm2", tuned, "-o", delta, "--quiet"]) == 0
    assert main(["delta", "apply", "smollm2", delta, "-o", out, "--undo", undo, "--quiet"]) == 0
    assert same_bits(load_state(out), state)
    assert main(["delta", "apply", out, undo, "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert same_bits(load_state(tmp_path / "again"), load_state(zoo.get("smollm2")))
    assert main(["delta", "overlap", delta, delta, "--base", "smollm2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["agreement"] == 1.0
    assert main(["delta", "convert", delta, "-o", str(tmp_path / "a"), "--to", "shira", "--base", "smollm2"]) == 0
