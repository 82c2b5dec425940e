"""A training run from its configuration to its summary: data, model, state, step, loop."""

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax

from attnres_jax.config import Config, flatten
from attnres_jax.data import heldout_batches, train_iterator
from attnres_jax.evaluation.perplexity import evaluate
from attnres_jax.parallel import describe, make_mesh, put_batch, replicated, use_mesh
from attnres_jax.parallel.processes import AnyProcess, one_first, require_same
from attnres_jax.training.checkpoints import Checkpoints, abstract_state
from attnres_jax.training.compilation import compile_step, program_bytes
from attnres_jax.training.diagnostics import DepthDiagnostics
from attnres_jax.training.flops import peak_flops, training_flops_per_token
from attnres_jax.training.interruption import Interruption
from attnres_jax.training.meter import Meter, NonFiniteError
from attnres_jax.training.optimizer import learning_rate_schedule, make_optimizer
from attnres_jax.training.parameters import count_parameters, parameter_table
from attnres_jax.training.progress import Progress
from attnres_jax.training.records import Records, read_summary, write_summary
from attnres_jax.training.start import initial_model, open_text, start_text
from attnres_jax.training.state import new_state
from attnres_jax.training.step import batch_shapes, make_train_step
from attnres_jax.training.workdir import claim


def train(config: Config, workdir: Path | str) -> dict[str, Any]:
    """Trains in `workdir`, going on from its newest checkpoint if it has one, and returns the run's summary.

    What was interrupted continues bitwise as if it had not been. SIGTERM and Ctrl-C end the run early with a
    checkpoint and `status` "interrupted", in whichever process they arrive. A finished run is left alone.

    Raises:
      WorkdirError: if the directory cannot hold this run.
      CheckpointError: if the newest checkpoint cannot be read.
      ChangedTextError: if the text is not that of the checkpoint.
      ConfigError: if the devices do not make up the mesh that `config.mesh` asks for.
      NonFiniteError: naming the step whose loss, gradients or parameters are not finite.
      ProcessError: if the processes of a run have different configurations or texts.
    """
    workdir, training, steps = Path(workdir), config.training, config.training.steps
    same = json.dumps({key: value for key, value in flatten(config).items() if key != "data.cache_dir"})
    require_same("their configuration; give all the same flags", hashlib.sha256(same.encode()).hexdigest()[:8])
    mesh = make_mesh(config)
    with (
        use_mesh(mesh),
        one_first(lambda: claim(workdir, config)),
        Checkpoints(workdir / "checkpoints", keep=training.keep_checkpoints) as checkpoints,
        Interruption() as stop,
    ):
        start = checkpoints.latest() or 0
        summary = read_summary(workdir)
        if start == steps and summary and summary["status"] == "finished":
            _say(f"{workdir} is finished: {steps} steps, held-out loss {summary['final_loss']:.4f}; nothing to train")
            return summary

        # Data: the same batches in the same order for every run of this seed.
        text = one_first(lambda: (open_text if start else start_text)(config, workdir))
        require_same("the text; data.files is to match the same on every machine", text.fingerprint)
        batches = train_iterator(text, config.data, seed=config.seed)
        heldout = [put_batch(mesh, batch) for batch in heldout_batches(text, config.data, training.eval_sequences)]
        token_bytes = jax.device_put(text.token_bytes, replicated(mesh))

        # Model and optimizer, as shapes: a restored state is never initialised first.
        shapes = abstract_state(config, mesh)
        schedule = learning_rate_schedule(config.optimizer, steps)
        optimizer = make_optimizer(config.optimizer, schedule)
        flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
        _say(parameter_table(shapes.model, config.optimizer))
        _say(f"training takes {flops_per_token:,} FLOPs per token; {describe(mesh)}")

        # State: restored or new.
        record = {"text": text.fingerprint, "seconds": 0.0, "compile_seconds": None, "peak_memory_bytes": None}
        if start:
            record = checkpoints.record(start)
            checkpoints.check_text(start, text.fingerprint)
            state = checkpoints.restore(start, shapes, batches)
            _say(f"resuming {workdir} at step {start} of {steps}")
        else:
            model = initial_model(config, shapes.model) if training.init_from else None
            born = jax.tree.map(lambda leaf: leaf.sharding, shapes)
            state = jax.jit(partial(new_state, config, optimizer), out_shardings=born, donate_argnums=0)(model)
            del model

        # Step.
        if start < steps and not stop.requested_anywhere():
            _say("compiling the step")
            train_step = make_train_step(training, optimizer, schedule, shapes, config.pipeline)
            shapes_of_batch = batch_shapes(config.data, mesh)
            train_step, record["compile_seconds"] = compile_step(train_step, shapes, shapes_of_batch, token_bytes)
            record["peak_memory_bytes"] = program_bytes(train_step)

        # Loop.
        with Records(workdir, start) as records, Progress(config.name, start, steps) as progress:

            def emit(row: dict[str, Any]) -> None:
                records.write(row)
                progress.show(row)

            diagnostics = DepthDiagnostics(config.metrics)
            meter = Meter(
                start=start,
                seconds=record["seconds"],
                tokens_per_step=config.data.batch_size * config.data.sequence_length,
                flops_per_token=flops_per_token,
                peak_flops=peak_flops(jax.devices()),
                is_due=lambda step: step in (1, steps) or step % training.log_every == 0 or diagnostics.is_due(step),
                emit=emit,
            )

            def evaluate_at(step: int) -> None:
                result = evaluate(state.model, heldout, token_bytes, splits=training.accumulation)
                if not math.isfinite(result.loss):
                    raise NonFiniteError(f"step {step} is not finite (held-out loss {result.loss})")
                row = {"kind": "eval", "step": step, "loss": result.loss}
                emit(row | {"bits_per_byte": result.bits_per_byte} | meter.totals(step))

            if training.init_from and not start:  # what was there before
                with meter.paused():
                    evaluate_at(0)
            step, stopping, asked = start, stop.requested_anywhere(), AnyProcess(mesh)
            try:
                while step < steps and not stopping:
                    step, batch = step + 1, put_batch(mesh, next(batches))
                    due = diagnostics.is_due(step)
                    # Before the step, of the model whose gradients it takes: afterwards its buffers are gone.
                    measured = diagnostics.measure(state.model, batch, meter.paused) if due else {}
                    state, metrics = train_step(state, batch, token_bytes)
                    meter.push(step, metrics | measured)
                    progress.advance()
                    stopping = asked(stop.requested is not None)
                    evaluating = step % training.eval_every == 0 or step == steps
                    saving = step % training.checkpoint_every == 0 or step == steps or stopping
                    if evaluating or saving:
                        with meter.paused():  # raises before anything that is not finite is evaluated or saved
                            if evaluating:
                                evaluate_at(step)
                            if saving:
                                checkpoints.save(step, state, batches, record | {"seconds": meter.seconds})
            except NonFiniteError as error:
                good = checkpoints.latest()
                kept = f"the checkpoint of step {good} is kept" if good else "there was no checkpoint yet"
                raise NonFiniteError(
                    f"{error}: stopped, {kept}; try optimizer.learning_rate below "
                    f"{config.optimizer.learning_rate:g} in a new --workdir"
                ) from None
            checkpoints.latest()  # waits until the last one is complete: only then is the run finished
            return write_summary(
                workdir,
                config,
                status="finished" if step == steps else "interrupted",
                steps=step,
                tokens=meter.totals(step)["tokens"],
                parameters=count_parameters(shapes.model),
                compile_seconds=record["compile_seconds"],
                peak_memory_bytes=record["peak_memory_bytes"],
                flops_per_token=flops_per_token,
                data_fingerprint=text.fingerprint,
            )


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
