"""The training step compiled for TPUs that need not be there, up to the schedule and the place of every buffer.

XLA decides first what runs when and where it lies, and then writes the chips' machine code, which for this project's
models takes ten times as long and changes nothing of that. So the compiler runs in a process of its own and is stopped
once it has dumped its decisions, unless the machine code is wanted too.
"""

import dataclasses
import multiprocessing
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from attnres_jax.config import Config
from attnres_jax.errors import UserError
from attnres_jax.parallel.chips import slice_devices
from attnres_jax.parallel.mesh import make_mesh
from attnres_jax.parallel.sharding import replicated, use_mesh
from attnres_jax.training import learning_rate_schedule, make_optimizer, make_train_step
from attnres_jax.training.checkpoints import abstract_state
from attnres_jax.training.step import batch_shapes

POLL_SECONDS = 2


class CompilationError(UserError):
    """The TPU compiler failed, for another reason than memory."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of a step on one device.

    Attributes:
      argument_bytes: of state and batch as they are laid out on the chip.
      total_bytes: of all its buffers, the arguments included.
      code_bytes: of its machine code; None if that was not generated.
      text: its HLO after all optimisations; empty where the compiler did not say it.
      seconds: that compiling took.
    """

    argument_bytes: int
    total_bytes: int
    code_bytes: int | None
    text: str
    seconds: float


def compile_step(config: Config, topology: str, *, code: bool = False) -> Program:
    """The step that `train` would run, compiled for a slice in a process of its own.

    Args:
      config: the run.
      topology: a slice as `slice_devices` takes it.
      code: whether to wait for the machine code.

    Raises:
      CompilationError: if the compiler gives up, but not for want of memory.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = multiprocessing.get_context("spawn").Process(target=_compile, args=(config, topology, folder))
        process.start()
        try:
            sizes: list[int] = []
            while process.is_alive():
                process.join(POLL_SECONDS)
                before, sizes = sizes, [file.stat().st_size for file in _dumps(folder).values()]
                if not code and len(sizes) == len(DUMPS) and sizes == before:
                    break
        finally:
            process.kill()
            process.join()
        return _read(folder, process.exitcode, time.perf_counter() - started)


def lower_step(config: Config, mesh: Mesh) -> Any:
    """The step as `jax.stages.Lowered`, for the devices of the mesh."""
    with use_mesh(mesh):
        state = abstract_state(config, mesh)
        schedule = learning_rate_schedule(config.optimizer, config.training.steps)
        optimizer = make_optimizer(config.optimizer, schedule)
        step = make_train_step(config.training, optimizer, schedule, state, config.pipeline)
        token_bytes = jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.int32, sharding=replicated(mesh))
        return step.lower(state, batch_shapes(config.data, mesh), token_bytes)


DUMPS = {
    "buffers": "after_optimizations-buffer-assignment.txt",
    "text": "after_optimizations.txt",
    "last": "after_optimizations_after_buffer_assignment.txt",
}
"""What XLA writes of a module, by the end of the file's name; the last of them last."""


def _compile(config: Config, topology: str, folder: Path) -> None:
    """Runs in the process that may be stopped: leaves dumps, and either the size of the code or an error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    devices, _ = slice_devices(topology)
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    try:
        compiled = lower_step(config, make_mesh(config, devices)).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        (folder / "error").write_text(str(error))
    else:
        (folder / "code").write_text(str(compiled.memory_analysis().generated_code_size_in_bytes))


def _end_with_parent() -> None:
    """Lets no compiler go on that nobody waits for, however the parent ended."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _dumps(folder: Path) -> dict[str, Path]:
    found = {key: next(folder.glob(f"*.jit_step.*.{end}"), None) for key, end in DUMPS.items()}
    return {key: file for key, file in found.items() if file}


def _read(folder: Path, exit_code: int | None, seconds: float) -> Program:
    files, error, code = _dumps(folder), folder / "error", folder / "code"
    message = " ".join(error.read_text().split()) if error.exists() else f"exit code {exit_code}"
    # A program that is too large for the chip is refused once its buffers are known.
    if "buffers" not in files or (error.exists() and "Ran out of memory" not in message):
        raise CompilationError(f"the TPU compiler failed: {message[:300]}")
    arguments, total = allotted(files["buffers"].read_text())
    code_bytes = int(code.read_text()) if code.exists() else None
    return Program(arguments, total, code_bytes, files["text"].read_text() if "text" in files else "", seconds)


def allotted(buffers: str) -> tuple[int, int]:
    """(bytes of the arguments, bytes of all allocations) in a device's main memory, from XLA's dump of them.

    Other memories have a color, and what is thread-local lives inside a fusion and is no memory at all.
    """
    arguments = total = 0
    for size, what in re.findall(r"^allocation \d+: size (\d+), (.*)$", buffers, re.MULTILINE):
        if "thread-local" not in what and not re.search(r"\bcolor [1-9]", what):
            total += int(size)
            arguments += int(size) if re.search(r"\bparameter \d", what) else 0
    return arguments, total
