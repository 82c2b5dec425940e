"""What a run starts with: its text and tokenizer, and the parameters of a model that is there already."""

from pathlib import Path

import jax

from attnres_jax.config import Config
from attnres_jax.data import END_OF_TEXT, TextData, load_text
from attnres_jax.errors import ConfigError
from attnres_jax.interop import load_pretrained, load_tokenizer, pretrained_config
from attnres_jax.interop.hub import COMPANIONS, copy_companions, local_directory
from attnres_jax.interop.store import read_json
from attnres_jax.models import Decoder, differences, named_leaves
from attnres_jax.training.workdir import write_json, write_text


def start_text(config: Config, workdir: Path) -> TextData:
    """The text of a run that begins; its tokenizer is put into the workdir, for good and as other libraries read it.

    Raises:
      UserError: if the text or the tokenizer cannot be used, or the model is not that of `training.init_from`.
    """
    if jax.process_index() != 0:
        return open_text(config, workdir)
    if config.training.init_from:
        _refuse_another_model(config)  # before the text, which may take long
    for name in COMPANIONS:  # left by a run that never began
        (workdir / name).unlink(missing_ok=True)
    if config.data.tokenizer:
        _keep_given(config.data.tokenizer, workdir)
        return open_text(config, workdir)
    text = open_text(config, workdir)
    write_text(workdir / "tokenizer.json", text.tokenizer.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write_json(workdir / "tokenizer_config.json", settings)
    return text


def open_text(config: Config, workdir: Path) -> TextData:
    """The text of a run that has begun.

    Raises:
      UserError: if the text or the tokenizer cannot be used.
    """
    given = load_tokenizer(workdir) if config.data.tokenizer else None
    return load_text(config.data, config.model.vocab_size, given)


def initial_model(config: Config, shapes: Decoder) -> Decoder:
    """The model of `training.init_from` under the run's depth rule, in float32, each parameter where `shapes` says.

    Raises:
      InteropError: if the directory cannot be loaded, or has depth weights of another rule.
    """
    born = {name: leaf.sharding for name, leaf in named_leaves(shapes).items()}
    loaded = load_pretrained(
        config.training.init_from,
        config.model.depth,
        param_dtype="float32",
        sharding=lambda name, shape: born[name],
        progress=jax.process_index() == 0,
    )
    arrays = named_leaves(loaded)
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in born])


def _refuse_another_model(config: Config) -> None:
    source = config.training.init_from
    for key, (theirs, ours) in differences(pretrained_config(source, config.model.depth), config.model).items():
        raise ConfigError(
            f"model.{key}={ours!r} is {theirs!r} in training.init_from={source!r}; "
            f"configs/finetune.py:model={source} asks for all that it has"
        )


def _keep_given(name: str, workdir: Path) -> None:
    directory = local_directory(name)
    load_tokenizer(directory)  # refuses a directory without one
    copy_companions(directory, workdir)
    # What ends a text may stand in config.json alone, and that of the workdir is the run's.
    path, settings = directory / "config.json", workdir / "generation_config.json"
    end = read_json(path).get("eos_token_id") if path.exists() else None
    if end is not None and not settings.exists():
        write_json(settings, {"eos_token_id": end})
