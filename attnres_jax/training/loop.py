"""A training run from its configuration to its summary: data, state, step, restore, loop."""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from attnres_jax.config import Config
from attnres_jax.data import heldout_batches, load_text, train_iterator
from attnres_jax.evaluation.perplexity import evaluate
from attnres_jax.training.checkpoints import CheckpointError, Checkpoints, abstract_state
from attnres_jax.training.compilation import compile_step, program_bytes
from attnres_jax.training.flops import peak_flops, training_flops_per_token
from attnres_jax.training.interruption import Interruption
from attnres_jax.training.meter import Meter, NonFiniteError
from attnres_jax.training.optimizer import learning_rate_schedule, make_optimizer
from attnres_jax.training.parameters import count_parameters, parameter_table
from attnres_jax.training.progress import Progress
from attnres_jax.training.records import Records, read_summary, write_summary
from attnres_jax.training.state import new_state
from attnres_jax.training.step import make_train_step
from attnres_jax.training.workdir import claim


def train(config: Config, workdir: Path | str) -> dict[str, Any]:
    """Trains in `workdir`, going on from its newest checkpoint if it has one, and returns the run's summary.

    What was interrupted continues bitwise as if it had not been. SIGTERM and Ctrl-C end the run early with a
    checkpoint and `status` "interrupted". A finished run is left alone.

    Raises:
      WorkdirError: if the directory cannot hold this run.
      CheckpointError: if the text has changed since the checkpoint.
      NonFiniteError: naming the step whose loss, gradients or parameters are not finite.
    """
    workdir, training, steps = Path(workdir), config.training, config.training.steps
    with claim(workdir, config), Checkpoints(workdir / "checkpoints", keep=training.keep_checkpoints) as checkpoints:
        start = checkpoints.latest() or 0
        summary = read_summary(workdir)
        if start == steps and summary and summary["status"] == "finished":
            _say(f"{workdir} is finished: {steps} steps, held-out loss {summary['final_loss']:.4f}; nothing to do")
            return summary

        # Data.
        text = load_text(config.data, config.model.vocab_size)
        batches = iter(
            train_iterator(
                text,
                config.data,
                seed=config.seed,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        heldout = heldout_batches(text, config.data, training.eval_sequences)
        token_bytes = jnp.asarray(text.token_bytes)

        # Model, optimizer and step.
        schedule = learning_rate_schedule(config.optimizer, steps)
        optimizer = make_optimizer(config.optimizer, schedule)
        train_step = make_train_step(training, optimizer, schedule)
        shapes = abstract_state(config)
        flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
        _say(f"{parameter_table(shapes.model)}\n{flops_per_token:,} training FLOPs per token on {jax.devices()[0].device_kind}")

        # State: restored, or new.
        record = {"seconds": 0.0, "text": text.fingerprint, "compile_seconds": None, "program_bytes": None}
        if start:
            record = _record_of_same_text(checkpoints, start, text.fingerprint, workdir)
            state = checkpoints.restore(start, shapes, batches)
            _say(f"resuming {workdir} at step {start} of {steps}")
        else:
            state = jax.jit(partial(new_state, config, optimizer))()

        # Loop.
        with Records(workdir, start) as records, Progress(config.name, start, steps) as progress, Interruption() as stop:

            def emit(row: dict[str, Any]) -> None:
                records.write(row)
                progress.show(row)

            ...
