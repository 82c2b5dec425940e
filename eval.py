"""Evaluates a trained run on its held-out text.

python eval.py --workdir=runs/a [--step=200]
python eval.py --workdir=runs/a --pretrained=DIRECTORY   (an exported model in the place of the checkpoint)

Several processes: as in train.py.
"""

from pathlib import Path
from typing import Any

import jax
from absl import flags

from attnres_jax.cli import launch
from attnres_jax.config import Config, read_config
from attnres_jax.data import heldout_batches
from attnres_jax.errors import ConfigError
from attnres_jax.evaluation import evaluate
from attnres_jax.interop import load_pretrained
from attnres_jax.interop.hub import local_directory
from attnres_jax.interop.store import read_json
from attnres_jax.parallel import mesh_that_fits, put_batch, use_mesh
from attnres_jax.parallel.processes import define_flags, joined
from attnres_jax.training import enable_compilation_cache, restore_model, restore_text

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.")
PRETRAINED = flags.DEFINE_string("pretrained", None, "A checkpoint directory to evaluate on the run's text instead.")
GROUP = define_flags()
flags.mark_flag_as_required("workdir")


def main(arguments: list[str], overrides: list[str]) -> None:
    """Model, text, loss."""
    if arguments or overrides:
        raise flags.Error(f"{(arguments + overrides)[0]!r} is not understood; the config is that of the workdir")
    if None not in (STEP.value, PRETRAINED.value):
        raise flags.Error(f"--step={STEP.value} is a checkpoint of the run, --pretrained is not; give one of them")
    workdir = Path(WORKDIR.value)
    config = read_config(workdir / "config.json")
    enable_compilation_cache(config.data)
    with joined(GROUP(), config.training.process_timeout):
        line = evaluate_run(workdir, config)
        if jax.process_index() == 0:
            print(line)


def evaluate_run(workdir: Path, config: Config) -> str:
    """What to print."""
    mesh = mesh_that_fits(config)
    if PRETRAINED.value is None:
        config, model, step = restore_model(workdir, STEP.value, mesh)
        name = f"{workdir} at step {step}"
    else:
        step, name, directory = None, PRETRAINED.value, local_directory(PRETRAINED.value)
        model = load_pretrained(directory, mesh=mesh)
        sizes = model.config.vocab_size, config.model.vocab_size
        if sizes[0] != sizes[1] or not is_own_tokenizer(directory, workdir):
            raise ConfigError(
                f"--pretrained={name} (a vocabulary of {sizes[0]}) does not read the tokens of {workdir} "
                f"({sizes[1]}); give a model that was exported from this run, or trained on its tokens"
            )
    text = restore_text(workdir, step)
    batches = heldout_batches(text, config.data, config.training.eval_sequences)
    with use_mesh(mesh):
        placed = [put_batch(mesh, batch) for batch in batches]
        result = evaluate(model, placed, text.token_bytes, splits=config.training.accumulation)
    return (
        f"{name}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte ({result.tokens:,} tokens)"
    )


def is_own_tokenizer(directory: Path, workdir: Path) -> bool:
    """Whether the tokenizer of a model's directory makes the tokens of a run; without one it is taken to."""
    theirs, own = vocabulary(directory), vocabulary(workdir)
    return theirs is None or theirs == own


def vocabulary(directory: Path) -> Any:
    """What of a directory's tokenizer decides which tokens a text has; None without one."""
    if (directory / "tokenizer.json").exists():
        return read_json(directory / "tokenizer.json").get("model")
    path = directory / "tiktoken.model"
    return path.read_bytes() if path.exists() else None


if __name__ == "__main__":
    launch(main)
