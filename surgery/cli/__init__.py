"""The command `surgery`: thin; whatever it does is one call of the Python library.

| file       | commands                                                          |
|------------|-------------------------------------------------------------------|
| merge.py   | `merge`, `methods`                                                |
| vector.py  | `vector extract`, `apply`, `combine`, `export-lora`               |
| look.py    | `vector inspect`, `vector check`                                  |
| zoo.py     | `zoo list`, `zoo get`                                             |
| evaluate.py| `eval`                                                            |
| generate.py| `generate`                                                        |
| explore.py | `explore`                                                         |
| patch.py   | `patch`                                                           |
| pairs.py   | `tuco`, `diff`                                                    |
| circuit.py | `circuit find`, `circuit test`                                    |
| train.py   | `train`                                                           |
| recipes.py | `recipes list`, `recipes show`                                    |
| rollouts.py | `rollouts inspect`                                               |
| tune.py    | `tune list`, `show`, `select`                                     |
| delta.py   | `delta extract`, `apply`, `overlap`, `convert`                    |
| sae.py     | `sae train`, `measure`, `convert`, `list`                         |
| sae_features.py, sae_tune.py | `sae features`, `sae tune`                      |
| demo.py    | `demo`                                                            |

Around them: frame.py (global options, what is said and how), models.py (names of models and vectors), composed.py
(formulas of models, and how their models are asked), completions.py (how completions are told), prompts.py (files of
prompts). Formulas are those of `surgery.formula`. A new command is one function with `@command(app, name)`.

Exit codes: 0 done, 1 a check failed or something went wrong while running, 2 wrong input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def run() -> NoReturn:
    """The console script: `main` in a process of its own, which is over when the work is.

    Two habits of Python would cost half a second a command: collecting garbage over and over while torch is imported
    (0.1 s), and taking torch apart module by module at the end (0.35 s).
    """
    gc.set_threshold(100_000, 50, 50)
    code = main()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            with contextlib.suppress(OSError):  # a reader that has gone
                stream.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: the process's own) and returns its exit code."""
    import typer

    from surgery.cli import frame
    from surgery.cli.app import app
    from surgery.errors import SurgeryError

    words = list(sys.argv[1:] if arguments is None else arguments)
    frame.start(words)
    try:
        return app(words, prog_name="surgery", standalone_mode=False) or 0
    except SurgeryError as error:
        return frame.failed(error, error.problem, error.hint, code=2)
    except (KeyboardInterrupt, typer.Abort) as error:
        return frame.failed(error, "Stopped.", frame.STATE.on_stop, code=130)
    except BrokenPipeError:  # the reader of our output has gone: `surgery zoo list | head -1`
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return frame.failed(error, f"{error.strerror or error}{where}.", None, code=1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, for wrong usage
            problem, where = error.format_message(), getattr(getattr(error, "ctx", None), "command_path", "surgery")
            # a group that is called alone has shown its help, and there is no more to say
            return frame.failed(error, problem, f"`{where} --help` shows how it is used.", code=2) if problem else 2
        hint = "This is a fault of the program; --debug shows where it is."
        return frame.failed(error, f"{type(error).__name__}: {error}", hint, code=1)
