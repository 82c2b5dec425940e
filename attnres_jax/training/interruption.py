"""SIGTERM and Ctrl-C as a request to stop after the step in hand."""

import contextlib
import os
import signal
import threading
from typing import Any

from attnres_jax.parallel.processes import gather


class Interruption(contextlib.AbstractContextManager):
    """While entered, the first SIGTERM or SIGINT only sets `requested`; a second one acts as it always did."""

    requested: str | None = None
    """The signal's name."""

    def requested_anywhere(self) -> bool:
        """Whether any process of the run has had one; waits for all of them."""
        return any(gather(self.requested or ""))

    def __enter__(self) -> "Interruption":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _request(self, number: int, _: Any) -> None:
        self.requested = signal.Signals(number).name
        # Not print: a handler may run in the middle of another write to the same stream.
        told = "finishing this step, then saving and stopping; once more to stop at once, unsaved"
        os.write(2, f"\n{self.requested}: {told}\n".encode())
        self.__exit__()
