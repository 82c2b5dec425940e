"""`config.json`: which family a directory is of, and its model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres_jax.config import ModelConfig
from attnres_jax.errors import ConfigError
from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.store import read_json
from attnres_jax.interop.tables import TABLES
from attnres_jax.models import FAMILIES, Family, family_of
from attnres_jax.models.family import differences, write_depth

DEPTH_KEYS = ("attn_res_block_size", "attn_res_sum")
CODE = "auto_map"
FURTHER = "num_nextn_predict_layers"


def read_config_json(directory: Path) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """(family, model, the file itself).

    Raises:
      InteropError: one line, for an unknown `model_type`, a setting that is missing or not supported, or a run.
    """
    path = directory / "config.json"
    values = read_json(path)
    if {"model", "training"} <= values.keys():
        raise InteropError(
            f"{directory} is a run of train.py; export it first: python -m attnres_jax.interop export {directory} OUT"
        )
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES or kind not in TABLES:
        raise InteropError(f"{path}: model_type={kind!r} is unknown; known: {', '.join(sorted(FAMILIES))}")
    try:
        return FAMILIES[kind], FAMILIES[kind].read(values), values
    except ConfigError as error:
        raise InteropError(f"{path}: {error}") from None


def config_json_of(
    config: ModelConfig, like: Path | None = None, quantised: bool = False, dtype: str | None = None
) -> tuple[Family, dict[str, Any]]:
    """(family, `config.json`) of a model; with `like`, that directory's file under the model's depth rule.

    What it says of quantised tensors stays where they are to be `quantised` again; `dtype` is that of the others.

    Raises:
      InteropError: if no family can hold the model, or `like` describes another one.
    """
    try:
        if like is None:
            family = family_of(config)
            return family, _as_written(family.write(config), quantised, dtype)
        family, there, values = read_config_json(like)
        differing = differences(there, config)
        if differing:
            raise InteropError(f"{like} is another model: it differs in {', '.join(differing)}")
        return family, _as_written(with_depth(family, values, config), quantised, dtype)
    except ConfigError as error:
        raise InteropError(str(error)) from None


def num_further_layers(family: Family, values: Mapping[str, Any]) -> int:
    """Layers of multi-token prediction behind the last one, which a checkpoint may have and nothing here reads.

    Raises:
      InteropError: if the number is none.
    """
    number = family.text_settings(values).get(FURTHER) or 0
    if type(number) is not int or not 0 <= number <= 100:
        raise InteropError(f"{FURTHER}={number!r} is no number of layers")
    return number


def with_depth(family: Family, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A `config.json` under the depth rule of `config`, and without `auto_map`, whose code does not come along."""
    text = _text_with_depth(family.text_settings(values), config)
    if family.nested is None:
        return text
    return {key: value for key, value in values.items() if key != CODE} | {family.nested[0]: text}


def _text_with_depth(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    depth = write_depth(config.depth)
    kept = {key: value for key, value in values.items() if key not in (*DEPTH_KEYS, CODE)}
    if "attn_res_block_size" in values and not depth:
        kept["attn_res_block_size"] = None
    # A block size beyond the stack says the same as the clipped one: what was written stays.
    there = values.get("attn_res_block_size")
    if depth and isinstance(there, int) and min(there, config.num_layers) == depth["attn_res_block_size"]:
        depth["attn_res_block_size"] = there
    return kept | depth


def _as_written(values: Mapping[str, Any], quantised: bool, dtype: str | None) -> dict[str, Any]:
    """A `config.json` for the tensors that are written: no multi-token prediction; plain, of `dtype`, or quantised."""
    kept = {
        key: _as_written(value, quantised, dtype) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if quantised or key != "quantization_config"
    }
    kept |= dict.fromkeys({"dtype", "torch_dtype"} & set(kept), dtype) if dtype else {}
    return kept | ({FURTHER: 0} if kept.get(FURTHER) else {})


def write_config_json(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes the file."""
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
