"""A trained run as a checkpoint directory for others."""

from pathlib import Path

from attnres_jax.interop import load_tokenizer, save_pretrained
from attnres_jax.interop.hub import copy_companions
from attnres_jax.training.checkpoints import restore_model


def export_run(
    workdir: Path | str,
    directory: Path | str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    progress: bool = False,
) -> int:
    """Writes the model of a run, its tokenizer and, of one that began with `training.init_from`, the settings there.

    Args:
      workdir: a run's directory.
      directory: new or empty.
      step: which checkpoint; None: the newest.
      dtype: of tensors and, once loaded, activations: float32 or bfloat16; None: as trained.
      progress: shows a bar.

    Returns:
      The step of the checkpoint.

    Raises:
      UserError: if there is no such checkpoint, the format has no place for the model, or the directory is in use.
    """
    config, model, step = restore_model(workdir, step)
    load_tokenizer(workdir)  # refuses a workdir that has lost its own
    like = config.training.init_from or None
    save_pretrained(
        model,
        directory,
        like=like,
        dtype=dtype or ("float32" if like else None),  # not that of the tensors there
        progress=progress,
        write_more=lambda folder: copy_companions(Path(workdir), folder),
    )
    return step
