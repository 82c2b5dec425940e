"""Trains three arms of one small config, compares them and writes a report: what `make demo` runs.

  python demo.py [--workdir=runs/demo] [--config.training.steps=100 ...]

Residual baseline, Block AttnRes and Full AttnRes see the same data in the same order, from the same seed. The same
command goes on where it stopped; arms that are done are left as they are.
"""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags

from attnres_jax.analysis import compare, depth_heatmap, is_inspected, read_run, text, write_report
from attnres_jax.cli import launch
from attnres_jax.config import flatten, load_config, read_config
from attnres_jax.errors import UserError

ROOT = Path(__file__).resolve().parent
ARMS = ("residual", "block", "full")
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where the arms and the report go.")


class DemoError(UserError):
    """An arm that did not finish."""

    exit_code = 1


def main(arguments: list[str], overrides: list[str]) -> None:
    """Trains what is not done, then compares."""
    if arguments:
        raise flags.Error(f"argument {arguments[0]!r} is not understood; settings are given as --config.key=value")
    folder = Path(WORKDIR.value)
    for number, arm in enumerate(ARMS, 1):
        workdir, config = folder / arm, f"{ROOT / 'configs' / 'tiny.py'}:residual={arm},seed=0"
        title = f"[{number}/{len(ARMS)}] {arm}"
        if is_done(workdir, load_config(config, overrides)):
            run = read_run(workdir)
            print(f"{title}: done, {run.config.training.steps} steps, held-out loss {run.final_loss:.4f}", flush=True)
            continue
        print(f"{title}: {'resuming' if (workdir / 'checkpoints').exists() else 'training'} in {workdir}", flush=True)
        settings = [f"--config.{override}" for override in overrides]
        code = call([sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}", *settings])
        if status(workdir) == "interrupted" and not code:
            raise DemoError(f"{arm} was interrupted and saved; go on with: python {shlex.join(sys.argv)}")
        if code or status(workdir) != "finished":
            raise DemoError(f"{arm} did not finish (exit code {code}, its reason stands above); workdir {workdir}")
    comparison = compare([folder / arm for arm in ARMS])
    picture = folder / "depth_weights.png"
    seen = read_run(folder / "block").inspection
    labels = (seen[key].tolist() for key in ("site_labels", "source_labels"))
    largest = float(np.nanmax(seen["depth_weights"][1:]))  # the first site has one source, with weight 1
    depth_heatmap(seen["depth_weights"], *labels, largest=largest).savefig(picture, dpi=150)
    report = write_report(comparison, folder / "report.html")
    print(f"\n{text(comparison)}\n\nreport: {report}\npicture: {picture}")


def is_done(workdir: Path, config) -> bool:
    """Whether this arm is trained and inspected, by this configuration: else train.py has something to do or to say."""
    whole = status(workdir) == "finished" and is_inspected(workdir)
    return whole and flatten(read_config(workdir / "config.json")) == flatten(config)


def status(workdir: Path) -> str:
    """How the run last ended; empty if it never did."""
    try:
        return json.loads((workdir / "summary.json").read_text())["status"]
    except (OSError, ValueError, KeyError):
        return ""


def call(command: list[str]) -> int:
    """Runs a child on this terminal and returns its exit code; it gets the time to save when a signal ends the demo."""
    child = None

    def hand_on(number: int, _) -> None:
        # Ctrl-C reaches the child by itself, as a member of the terminal's foreground group.
        if child is not None and number == signal.SIGTERM:
            child.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(command)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    launch(main)
