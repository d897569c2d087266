"""A command line that must be refused."""

from surgery.cli import main


def refused(argv, capsys):
    """What stderr says; nothing on stdout, no traceback, exit code 2."""
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == "" and captured.err.startswith("surgery: ") and "Traceback" not in captured.err
    return captured.err
