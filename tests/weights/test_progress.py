"""Progress of long work: every tensor is told, what is done never goes back and ends at the whole."""

import pytest
from helpers import tiny_family

from surgery.checkpoint import open_checkpoint
from surgery.cli import frame, main
from surgery.weights.compatibility import check
from surgery.weights.vector import TaskVector


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("what", ["save", "lossless", "apply", "change", "lora", "check"])
def test_progress_ends_at_the_whole(tmp_path, what, threads):
    base, tuned = tiny_family(tmp_path, 2)
    vector = TaskVector.between(base, tuned[0])
    told = []
    how = {"threads": threads, "progress": lambda *at: told.append(at)}
    matrices = [name for name, shape in vector.shapes.items() if len(shape) == 2]
    expected = vector.names
    if what == "save":
        vector.save(tmp_path / "v", "float32", **how)
    elif what == "lossless":
        vector.save(tmp_path / "v.safetensors", "lossless", **how)
    elif what in ("apply", "change"):
        vector.apply(base, tmp_path / "out", scale=1.0 if what == "apply" else 0.5, **how)
    elif what == "lora":
        vector.export_lora(tmp_path / "lora", rank=2, **how)
        expected = matrices
    else:
        check(open_checkpoint(base), [open_checkpoint(t) for t in tuned], **how)
    names, done, total = zip(*told, strict=True)
    assert set(names) == set(expected)
    assert list(done) == sorted(done) and done[0] > 0
    assert set(total) == {done[-1]}


def test_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frame, "EVERY", 0.0)
    base, (tuned,) = tiny_family(tmp_path, 1)
    vector = str(tmp_path / "v.safetensors")
    commands = {
        "Writing": ["extract", base, tuned, "-o", vector],
        "Applying": ["apply", vector, base, "-o", tmp_path / "out"],
        "Decomposing": ["export-lora", tuned, base, "-o", tmp_path / "lora", "--rank", "2"],
    }
    for word, command in commands.items():
        assert main(["vector", *map(str, command)]) == 0
        assert f"{word}: 100%" in capsys.readouterr().err
