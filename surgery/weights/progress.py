"""How far a pass over the weights is: told to whoever asks, after every tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a tensor that is done, bytes done so far, and bytes in all; one call at a time."""


class Tally:
    """Counts bytes from several threads; the callback is called in turn, so that what is done never goes back."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def add(self, name: str, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(name, self._done, self._total)
