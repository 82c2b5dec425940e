"""The progress of a run for a person: a bar on a terminal, else a plain line now and then; both on stderr."""

import contextlib
import datetime
import sys
import time
from typing import Any

import jax
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 2.0
"""Where there is no terminal; the first and the last logged step always have a line."""


class Progress(contextlib.AbstractContextManager):
    """Loss, tokens/s and the time left."""

    def __init__(self, name: str, start: int, steps: int):
        self._steps, self._shown = steps, -float("inf")
        quiet = jax.process_index() != 0
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=start, desc=name, unit="step", disable=quiet or self._lines, dynamic_ncols=True
        )

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def show(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics.jsonl: of training in the bar, of held-out text as a line of its own."""
        if row["kind"] == "eval":
            self._say(f"step {row['step']}: held-out loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits per byte")
            return
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed}", refresh=False)
        due = row["step"] == self._steps or time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES
        if self._lines and due:
            self._shown = time.monotonic()
            left = datetime.timedelta(seconds=round((self._steps - row["step"]) * row["step_seconds"]))
            self._say(f"step {row['step']}/{self._steps}  loss {row['loss']:.4f}  {speed}  {left} left")

    def _say(self, line: str) -> None:
        if self._lines:
            print(line, file=sys.stderr, flush=True)
        elif not self._bar.disable:
            self._bar.write(line, file=sys.stderr)
