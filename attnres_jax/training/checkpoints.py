"""Checkpoints: model, optimizer, step, random key and data position, saved by orbax while training goes on.

A save writes into `<step>.orbax-checkpoint-tmp` and renames it when every file is there, so that a directory named by a
step alone is complete. What a killed save leaves behind is removed when the directory is next opened for training.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from attnres_jax.config import Config, read_config
from attnres_jax.data import TextData
from attnres_jax.errors import UserError
from attnres_jax.parallel import one_device_mesh, with_shardings
from attnres_jax.parallel.processes import one_first
from attnres_jax.training.optimizer import learning_rate_schedule, make_optimizer
from attnres_jax.training.parameters import named_leaves
from attnres_jax.training.start import open_text
from attnres_jax.training.state import TrainState, new_state


class CheckpointError(UserError):
    """No such checkpoint, or one that cannot be read."""


class ChangedTextError(UserError):
    """The text is no longer the one that the checkpoint was trained on, so neither are its tokens."""


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of a run, in `directory`; leaving the context waits until the last save is complete."""

    def __init__(self, directory: Path, *, keep: int | None = None):
        """Opens the directory for training, keeping the newest `keep`; without `keep`, for reading only.

        Processes open, save and restore for training together; each reads by itself.
        """
        process = jax.process_index()
        if keep is None:
            # Not read_only=True, which warns at every opening: without a save nothing is written.
            alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
            options = ocp.CheckpointManagerOptions(
                create=False, save_root_metadata=False, multiprocessing_options=alone
            )
        else:
            # cleanup_tmp_directories=True would do it in the background, where a process that ends early trips over it.
            for left in directory.glob("*.orbax-checkpoint-tmp*") if process == 0 else ():
                shutil.rmtree(left, ignore_errors=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._workdir = directory.parent
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest of them; waits for a save under way."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, batches: Any, record: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied before this returns, so that the next step may overwrite them.

        `batches` is a grain iterator, `record` a small dict that goes with the checkpoint as JSON.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(_arrays(state.model)),
                training=ocp.args.StandardSave(_arrays(_without_model(state))),
                data=ocp.args.JsonSave(batches.get_state()),
                record=ocp.args.JsonSave(record),
            ),
        )

    def record(self, step: int) -> dict[str, Any]:
        """What was given to `save` as `record`.

        Raises:
          CheckpointError: if it cannot be read; as `restore` and `restore_model`.
        """
        return self._read(step, record=ocp.args.JsonRestore()).record

    def check_text(self, step: int, fingerprint: str) -> None:
        """Compares the text at hand with that of a checkpoint, whose record holds its fingerprint as `text`.

        Raises:
          ChangedTextError: if they differ.
        """
        then = self.record(step)["text"]
        if then != fingerprint:
            raise ChangedTextError(
                f"the text of {self._workdir} has changed since step {step} (fingerprint {then}, now {fingerprint}); "
                "bring back the text as it was, or train in a new --workdir"
            )

    def restore(self, step: int, shapes: TrainState, batches: Any) -> TrainState:
        """The state saved at `step`, put where the shapes' shardings say; sets the position of `batches`."""
        rest = _without_model(shapes)
        restored = self._read(
            step,
            model=ocp.args.StandardRestore(_arrays(shapes.model)),
            training=ocp.args.StandardRestore(_arrays(rest)),
            data=ocp.args.JsonRestore(),
        )
        batches.set_state(restored.data)
        return TrainState(model=_rebuild(shapes.model, restored.model), **_rebuild(rest, restored.training))

    def restore_model(self, step: int, shapes: Any) -> Any:
        """The model alone, as saved at `step`."""
        return _rebuild(shapes, self._read(step, model=ocp.args.StandardRestore(_arrays(shapes))).model)

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises bare ones for a damaged file
            reason = " ".join(str(error).split())[:200]
            message = f"the checkpoint of step {step} in {self._workdir} cannot be read: {reason}"
            earlier = [other for other in self.steps() if other < step]
            if earlier:
                place = self._workdir / "checkpoints" / str(step)
                message += f"; if it is damaged, remove {place} to go on from step {earlier[-1]}"
            raise CheckpointError(message) from error


def restore_model(workdir: Path | str, step: int | None = None, mesh: Mesh | None = None) -> tuple[Config, Any, int]:
    """Loads a trained model: (the run's configuration, the model, the step it was saved at).

    Args:
      workdir: a run's directory.
      step: which checkpoint; None: the newest.
      mesh: where the model goes, whatever mesh it was saved from; None: this process's first device.

    Raises:
      ConfigError: if this is not a run's directory.
      CheckpointError: if there is no checkpoint, none of that step, or one that cannot be read.
    """
    workdir = Path(workdir)
    config = read_config(workdir / "config.json")
    with open_checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        if step is None:
            step = steps[-1]
        elif step not in steps:
            raise CheckpointError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        model = checkpoints.restore_model(step, abstract_state(config, mesh).model)
    return config, model, step


def restore_text(workdir: Path | str, step: int | None = None) -> TextData:
    """The text of a run, for whoever looks at what a checkpoint makes of it; the processes of a group together.

    Args:
      workdir: a run's directory.
      step: which checkpoint; None: the newest.

    Raises:
      UserError: if there is no such run, checkpoint or text, or the text is not the one that it was trained on.
    """
    workdir = Path(workdir)
    config = read_config(workdir / "config.json")
    text = one_first(lambda: open_text(config, workdir))
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.check_text(checkpoints.steps()[-1] if step is None else step, text.fingerprint)
    return text


def open_checkpoints(workdir: Path) -> Checkpoints:
    """Opens a run's checkpoints for reading.

    Raises:
      CheckpointError: if there is none.
    """
    directory = workdir / "checkpoints"
    if directory.is_dir():
        checkpoints = Checkpoints(directory)
        if checkpoints.steps():
            return checkpoints
    raise CheckpointError(
        f"{workdir} has no complete checkpoint yet; train.py with this --workdir goes on until it has"
    )


def abstract_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Shapes, dtypes and shardings of a run's state on `mesh` (None: one device), without computing anything."""
    optimizer = make_optimizer(config.optimizer, learning_rate_schedule(config.optimizer, config.training.steps))
    return with_shardings(mesh or one_device_mesh(), jax.eval_shape(lambda: new_state(config, optimizer)))


def _without_model(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def _arrays(tree: Any) -> dict[str, Any]:
    """A flat dict by name, which reads the same whatever classes hold the arrays; typed keys as their data."""
    return {name: _key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named_leaves(tree).items()}


def _rebuild(shapes: Any, arrays: dict[str, Any]) -> Any:
    leaves = [
        jax.random.wrap_key_data(arrays[name]) if _is_key(leaf) else arrays[name]
        for name, leaf in named_leaves(shapes).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(key: Any) -> Any:
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    return jax.random.key_data(key)
