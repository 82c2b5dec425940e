"""Checkpoint directories from the command line.

  python -m attnres_jax.interop inspect  MODEL
  python -m attnres_jax.interop convert  MODEL DIRECTORY [--residual=block] [--layers_per_block=4] [--nosum_sources]
  python -m attnres_jax.interop verify   MODEL CONVERTED [--text=FILE]
  python -m attnres_jax.interop export   WORKDIR DIRECTORY [--step=200] [--dtype=bfloat16]

MODEL is a directory or a repository of the Hugging Face hub. `convert` turns a residual model into AttnRes with zero
queries, the same function; `verify` proves it on a text; `export` writes a trained run of train.py. Exit code: 0, 1 if
`verify` finds another function, 2 something to mend in the command.
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags

from attnres_jax.cli import launch
from attnres_jax.interop.convert import convert, load_pair, verify
from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.report import inspect_text, verification_text
from attnres_jax.interop.tokenizer import load_tokenizer

RESIDUAL = flags.DEFINE_string("residual", "block", "convert: the depth rule.")
LAYERS_PER_BLOCK = flags.DEFINE_integer(
    "layers_per_block", 0, "convert: layers in a block; 0: about eight blocks.", lower_bound=0
)
SUM_SOURCES = flags.DEFINE_bool("sum_sources", True, "convert: keep the norms' eps out of the difference.")
TEXT = flags.DEFINE_string(
    "text", None, "verify: a text file, which the model's tokenizer reads; without it random tokens."
)
TOKENS = flags.DEFINE_integer("tokens", 512, "verify: how many tokens at most.", lower_bound=1)
STEP = flags.DEFINE_integer("step", None, "export: which checkpoint; the newest if not given.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "export: of tensors and, once loaded, activations; as trained if not given."
)


def main(arguments: list[str], overrides: list[str]) -> int | None:
    """Dispatches."""
    commands = {"inspect": (_inspect, 1), "convert": (_convert, 2), "verify": (_verify, 2), "export": (_export, 2)}
    name, *rest = arguments or [""]
    if overrides:
        raise flags.Error(f"--config.{overrides[0]}: no command takes --config; a model has its own (see --help)")
    if name not in commands:
        raise flags.Error(f"command {name!r} is unknown; known: {', '.join(commands)} (see --help)")
    command, count = commands[name]
    if len(rest) != count:
        raise flags.Error(f"{name} takes {count} argument{'s' * (count > 1)}, not {len(rest)} (see --help)")
    return command(*rest)


def _inspect(model: str) -> None:
    print(inspect_text(model))


def _convert(model: str, directory: str) -> None:
    convert(
        model,
        directory,
        residual=RESIDUAL.value,
        layers_per_block=LAYERS_PER_BLOCK.value,
        sum_sources=SUM_SOURCES.value,
        progress=True,
    )
    print(f"{directory} written; prove it: python -m attnres_jax.interop verify {model} {directory}")


def _verify(original: str, converted: str) -> int:
    models = load_pair(original, converted, progress=True)
    found = verify(*models, _tokens(original, models[0].config))
    print(verification_text(found))
    return 0 if found.same else 1


def _tokens(original: str, config) -> np.ndarray:
    length = min(TOKENS.value, config.max_length)
    if TEXT.value is None:
        print(f"without --text: {length} random tokens")
        return np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)
    try:
        text = Path(TEXT.value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InteropError(f"--text={TEXT.value} cannot be read: {error}") from None
    try:
        ids = load_tokenizer(original).encode(text)[:length]
    except InteropError as error:
        raise InteropError(f"--text={TEXT.value}: {error}; without --text, random tokens are compared") from None
    if not ids or max(ids) >= config.vocab_size:
        raise InteropError(f"--text={TEXT.value} has no tokens, or one beyond the model's vocabulary")
    return np.array([ids], np.int32)


def _export(workdir: str, directory: str) -> None:
    # The command line is a script and stands above training; the package itself does not.
    from attnres_jax.training import export_run

    step = export_run(workdir, directory, step=STEP.value, dtype=DTYPE.value, progress=True)
    print(f"{directory} written from step {step} of {workdir}")


if __name__ == "__main__":
    sys.argv[0] = "attnres_jax.interop"
    launch(main)
