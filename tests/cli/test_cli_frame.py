"""What holds for every command: help with an example, streams, exit codes, start-up, Ctrl-C."""

import json
import subprocess
import sys

import pytest

from surgery.cli import main
from surgery.errors import SurgeryError

COMMANDS = [
    ["merge"], ["methods"], ["eval"], ["train"], ["demo"], ["zoo", "list"], ["zoo", "get"],
    ["recipes", "list"], ["recipes", "show"], ["rollouts", "inspect"],
    *(["vector", word] for word in ("extract", "apply", "combine", "inspect", "check", "export-lora")),
    *(["delta", word] for word in ("extract", "apply", "overlap", "convert")),
    *(["tune", word] for word in ("show", "select", "list")),
    *(["sae", word] for word in ("train", "measure", "convert", "list", "features", "tune")),
]  # fmt: skip
HEAVY = """
import sys
from surgery.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "pandas", "matplotlib", "huggingface_hub"} & sys.modules.keys()
print("heavy", code, *sorted(heavy), file=sys.stderr)
"""


def heavy_imports(*arguments):
    """Exit code and heavy modules after a command in a process of its own."""
    run = subprocess.run([sys.executable, "-c", HEAVY, *arguments], capture_output=True, text=True, timeout=300)
    _, code, *heavy = run.stderr.splitlines()[-1].split()
    return int(code), heavy


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_the_global_options(command, capsys):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"surgery {' '.join(command)}" in out.split("Example", 1)[1]
    assert all(option in out for option in ("--json", "--quiet", "--debug"))


def test_the_list_of_commands_here_is_whole(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    assert all(command[0] in listed for command in COMMANDS)
    for group in ("vector", "delta", "tune", "sae", "zoo", "recipes", "rollouts"):
        main([group, "--help"])
        shown = [line.split()[1] for line in capsys.readouterr().out.partition("Commands")[2].splitlines()
                 if line.startswith("│ ") and line[2] != " "]  # fmt: skip
        assert sorted(shown) == sorted(c[1] for c in COMMANDS if c[0] == group)


@pytest.mark.parametrize(
    "command",
    [["--help"], ["merge", "--help"], ["vector", "extract", "--help"], ["zoo", "list"], ["methods"],
     ["train", "--help"], ["recipes", "list"], ["recipes", "show", "grpo"],
     ["sae", "--help"], ["sae", "train", "--help"],
     ["methods", "ties"], ["vector", "check", "tiny-base", "tiny-chain", "--fast"],
     ["merge", "--method", "ties", "--base", "tiny-base", "tiny-chain", "tiny-shift", "--plan"]],
    ids=" ".join,
)  # fmt: skip
def test_what_needs_no_tensor_needs_no_torch(command):
    assert heavy_imports(*command) == (0, [])


def test_work_on_weights_imports_torch_and_nothing_else_that_is_heavy(tmp_path):
    models = ["tiny-base", "tiny-chain"]
    vector, out = str(tmp_path / "v.safetensors"), str(tmp_path / "out")
    assert heavy_imports("merge", "--method", "ties", "--base", *models, "-o", out) == (0, ["torch"])
    assert heavy_imports("vector", "extract", *models, "-o", vector) == (0, ["torch"])
    assert heavy_imports("vector", "apply", vector, "tiny-base", "-o", out, "--force") == (0, ["torch"])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["mrge"], "Did you mean 'merge'"),
        (["merge"], "`surgery merge --help`"),
        (["merge", "--densty", "1", "x"], "No such option"),
        (["merge", "--threads", "0", "x"], "--threads"),
        (["vector", "extract", "a", "b", "-o", "c", "--form", "zip"], "zip"),
    ],
)
def test_wrong_usage_is_a_sentence_and_exit_code_2(command, told, capsys):
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and told in captured.err and "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == 2


def test_a_group_alone_shows_its_help(capsys):
    assert main(["vector"]) == 2
    captured = capsys.readouterr()
    assert "extract" in captured.out and captured.err == ""


def test_version(capsys):
    from surgery import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"surgery {__version__}\n"


@pytest.mark.parametrize("words", [["--debug", "zoo", "get", "nothing"], ["zoo", "get", "nothing", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(words, capsys):
    assert main(words) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main([w for w in words if w != "--debug"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (SurgeryError("Too big.", hint="Make it smaller."), 2, "surgery: Too big.\nMake it smaller.\n"),
        (OSError(28, "No space left on device", "out"), 1, "surgery: No space left on device: out.\n"),
        (RuntimeError("odd"), 1, "RuntimeError: odd"),
        (KeyboardInterrupt(), 130, "surgery: Stopped.\n"),
    ],
)
def test_every_end_has_its_code_and_no_traceback(error, code, told, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("surgery.zoo.list_models", fail)
    assert main(["zoo", "list"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and told in captured.err and "Traceback" not in captured.err


def test_a_stopped_merge_says_that_it_goes_on_from_there(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.weights.merge.execute", stop)
    argv = ["merge", "--method", "linear", "tiny-chain", "tiny-shift", "-o", str(tmp_path / "out")]
    assert main(argv) == 130
    assert "goes on from there" in capsys.readouterr().err


def test_zoo_lists_and_copies(tmp_path, capsys):
    assert main(["zoo", "list", "--json"]) == 0
    names = [each["name"] for each in json.loads(capsys.readouterr().out)]
    assert names[0] == "tiny-base"
    assert main(["zoo", "list"]) == 0
    assert all(name in capsys.readouterr().out for name in names[:1])
    assert main(["zoo", "get", "tiny-base", "-o", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").is_file()


def test_methods_are_those_of_the_registry_each_with_a_line(capsys):
    from surgery.weights.methods import METHODS

    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["name"] for row in rows) == sorted(METHODS)
    assert all(row["what"] for row in rows)
    assert main(["methods", "tis"]) == 2
    assert "'ties'" in capsys.readouterr().err


def test_sizes_and_counts_in_words():
    from surgery.cli.frame import count, seconds, size

    assert [size(n) for n in (0, 999, 1000, 9_940, 99_700, 988_034_784, 4e12)] == [
        "0 B", "999 B", "1.00 kB", "9.94 kB", "100 kB", "988 MB", "4.00 TB"]  # fmt: skip
    assert (count(1, "tensor"), count(2, "tensor"), count(3, "matrix")) == ("1 tensor", "2 tensors", "3 matrices")
    assert (seconds(0.123), seconds(12.3), seconds(150)) == ("0.12 s", "12 s", "2.5 min")


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    from surgery.cli import frame

    monkeypatch.setattr(frame, "EVERY", 0.0)
    frame.start([])
    with frame.progress("Merging") as advance:
        advance("tensor", 1, 4)
    assert capsys.readouterr().err == "Merging: 25%\n"
    frame.start([])
    frame.set_global(json=False, quiet=True, debug=False)
    with frame.progress("Merging") as advance:
        advance("tensor", 1, 4)
    assert capsys.readouterr().err == ""
