"""Scripts of experiments as modules, for their tests: the fixture `experiment` (conftest.py) gives one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"


@contextmanager
def loaded(name: str) -> Iterator[object]:
    """A script as a module. It may register tasks and import its neighbours: afterwards all is as before."""
    from surgery.tasks import TASKS

    tasks, modules = dict(TASKS), set(sys.modules)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield __import__(name)
    finally:
        sys.path.remove(str(EXPERIMENTS))
        for task in set(TASKS) - set(tasks):
            del TASKS[task]
        for module in set(sys.modules) - modules:
            if str(getattr(sys.modules[module], "__file__", None) or "").startswith(str(EXPERIMENTS)):
                del sys.modules[module]
