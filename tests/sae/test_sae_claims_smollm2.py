"""Inside the claim about a real model's dictionary."""

import os
import sys

import pytest
import torch

from surgery.errors import SurgeryError

EXPERIMENT = "smollm2_dictionary"


def test_without_the_data_it_says_so(experiment, monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise SurgeryError("GSM8K is missing.")

    monkeypatch.setattr(experiment, "gsm8k", missing)
    monkeypatch.setattr(sys, "argv", ["smollm2_dictionary.py", "--out", str(tmp_path / "out")])
    experiment.main()
    assert "Nothing was run: GSM8K is missing." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_stands_before_every_problem_does_not_count(experiment):
    one = experiment.Setting(None, None, None, "", {"a": [[7, 8, 1], [7, 8, 2, 3]]}, {}, 2, 1, 1, 1, 1, 1)
    batch = experiment.Batch.of([[7, 8, 1, 4], [9, 8, 1, 4], [7, 8, 5, 0]], [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    assert one.keep(batch).int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]
    short = experiment.Batch.of([[7]])
    assert one.keep(short).int().tolist() == [[0]]


def test_texts_with_a_sink_are_not_held_out(experiment):
    one = experiment.tiny()
    texts = one.held_out["copy"][:6]
    found = one.read(texts, float("inf"))
    half = one.base.config.hidden_size
    longest = [float(rows[:, :half].norm(dim=1).max()) for _, rows in found]
    assert [ids for ids, _ in found] == texts
    bound = sorted(longest)[3]
    assert [ids for ids, _ in one.read(texts, bound)] == [t for t, n in zip(texts, longest, strict=True) if n <= bound]
    together = torch.cat([rows["resid_post.1"] for rows in one.stream([one.base, one.tuned], texts)])
    alone = torch.cat([rows for _, rows in sorted(found, key=lambda each: len(each[0]))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    (kept,) = experiment.read_as("x", iter([{"x": together}]), bound)
    assert len(kept["pair"]) == int((together[:, :half].norm(dim=1) <= bound).sum())
    torch.testing.assert_close(kept["difference"], kept["pair"][:, half:] - kept["base"])


def test_controls_are_what_they_say(experiment):
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 1, 1, 1]) + 4
    made = experiment.components(rows, 3)
    centred = rows.double() - rows.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred)
    quality = experiment.measure(made, [rows])
    assert quality.fvu == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-4)
    assert quality.l0 == pytest.approx(3, abs=1e-6)
    at_random = experiment.directions(rows, 40, 3)
    fitted = experiment.measure(at_random, [rows]).fvu
    assert fitted < 1
    with torch.no_grad():
        at_random.decoder.mul_(1.1)
    assert experiment.measure(at_random, [rows]).fvu > fitted, "no other factor is better"


def test_change_and_the_latents_that_changed(experiment):
    active = experiment.np.zeros((2, 10, 4), dtype=int)
    active[:, :, 0] = 5  # the same
    active[1, :, 1] = [3, 4, 5, 4, 3, 4, 5, 4, 3, 4]  # new
    active[0, ::2, 2] = active[1, 1::2, 2] = 2  # as often, elsewhere
    tokens = experiment.np.full(10, 20)
    found = experiment.Changed([0, 1, 2, 3], active, active.astype(float), active.min(0).sum(0), tokens)
    mean, sure = experiment.differing(found)
    assert sure.tolist() == [False, True, False, False] and mean[1] == pytest.approx(3.9 / 20)
    assert experiment.change(found)[0] == pytest.approx((3 + 2) / (5 + 2 + 5 + 3))


@pytest.mark.real
def test_smollm2_at_its_size(experiment, monkeypatch):
    """What is read of the real model: widths, the prefix, and held-out passages as long as the problems."""
    if not os.environ.get("SURGERY_DATA"):
        pytest.skip("SURGERY_DATA is not set")
    monkeypatch.setattr(experiment, "cached", lambda _: "smollm2")  # the fine-tuning takes minutes
    one = experiment.real()
    assert one.tokenizer.decode(one.texts["GSM8K"][0][: one.prefix]).endswith("<|im_start|>user\n")
    lengths = {kind: [len(ids) for ids in each] for kind, each in one.held_out.items()}
    assert [n - one.prefix for n in lengths["GSM8K"]] == [n - 1 for n in lengths["plays"]]
    (rows,) = one.stream([one.base, one.tuned], one.held_out["plays"][:2])
    assert rows["resid_post.14"].shape == (sum(lengths["plays"][:2]) - 2, 2 * 576)
