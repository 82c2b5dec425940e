"""Trains one run.

  python train.py --config=configs/tiny.py:residual=block --workdir=runs/a [--config.training.steps=100 ...]

The same command goes on where the run stopped, for whatever reason; a finished run is left as it is. SIGTERM and Ctrl-C
save and stop. Several processes are one run when each is started with the same command and, say,
--coordinator=10.0.0.1:1234 --num_processes=2 --process_id=0 (or 1); or all with --distributed, where Slurm, Kubernetes,
Cloud TPU or Open MPI started them. Exit code: 0 finished or interrupted, 1 a loss that is not finite or a process that
died, 2 something to mend in the command.
"""

import shlex
import sys
from pathlib import Path

import jax
from absl import flags

from attnres_jax.analysis import inspect_run, is_inspected
from attnres_jax.cli import launch
from attnres_jax.config import load_config
from attnres_jax.parallel.processes import define_flags, joined
from attnres_jax.training import enable_compilation_cache, retain_host_memory, train

CONFIG = flags.DEFINE_string("config", None, "Config file and its argument, as in configs/tiny.py:residual=block.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: new, empty, or this run's own.")
GROUP = define_flags()
flags.mark_flags_as_required(["config", "workdir"])


def main(arguments: list[str], overrides: list[str]) -> None:
    """Config, training, inspection."""
    if arguments:
        raise flags.Error(f"argument {arguments[0]!r} is not understood; settings are given as --config.key=value")
    config, workdir = load_config(CONFIG.value, overrides), Path(WORKDIR.value)
    enable_compilation_cache(config.data)
    retain_host_memory()
    with joined(GROUP(), config.training.process_timeout):
        summary = train(config, workdir)
        if summary["status"] == "finished" and not is_inspected(workdir):
            inspect_run(workdir)
    if jax.process_index() != 0:
        return
    if summary["status"] == "interrupted":
        command = f"python {shlex.join(sys.argv)}" if jax.process_count() == 1 else "the same command in every process"
        print(f"interrupted after step {summary['steps']} and saved; resume with: {command}")


if __name__ == "__main__":
    launch(main)
