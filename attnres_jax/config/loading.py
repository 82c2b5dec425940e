"""From a config file, a run or a mapping to a validated `Config`; unknown keys and wrong types end here."""

import dataclasses
import difflib
import importlib.util
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from attnres_jax.config.checks import validate
from attnres_jax.config.schema import Config
from attnres_jax.errors import ConfigError, UserError


def default_config() -> config_dict.ConfigDict:
    """Every key with its default, for a config file to change and return; what it changes is checked afterwards."""
    return config_dict.ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def arguments(text: str, **defaults: Any) -> config_dict.ConfigDict:
    """Parses a config file's string argument, `key=value,key=value`, into the types of `defaults`.

    Raises:
      ConfigError: for a key that is not in `defaults` or a value of another type.
    """
    args = config_dict.ConfigDict(defaults)
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(
                f"config argument {item!r} is not of the form key=value; known keys: {', '.join(defaults)}"
            )
        _assign(args, key, value, "config argument ")
    return args


def sublayers_in_block(block_size: int, layers_per_block: int, default: int) -> int:
    """`block_size`, said in sublayers or in transformer layers (two sublayers each); 0 is not said.

    Raises:
      ConfigError: if both are said and disagree.
    """
    if block_size and layers_per_block and block_size != 2 * layers_per_block:
        raise ConfigError(
            f"layers_per_block={layers_per_block} is block_size={2 * layers_per_block} (sublayers), not "
            f"block_size={block_size}; give one of the two"
        )
    return block_size or 2 * layers_per_block or default


def load_config(path_with_args: str, overrides: Sequence[str] = ()) -> Config:
    """Loads `configs/tiny.py:residual=block,seed=1` (a file with `get_config(argument)`), validated.

    Args:
      path_with_args: the file, then after a colon what it takes as its argument.
      overrides: `training.steps=100` and the like, applied last.

    Raises:
      ConfigError: one line naming the key, its value and what would be valid.
    """
    path, _, argument = path_with_args.partition(":")
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, map(str, Path(path).parent.glob("*.py")), 1)
        raise ConfigError(f"config file {path!r} does not exist" + (f"; did you mean {near[0]!r}?" if near else ""))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise ConfigError(
            f"config file {path!r} is no Python file; it is to end in .py and define get_config(argument)"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config(argument)
        if not isinstance(values, config_dict.ConfigDict):
            raise ConfigError(f"get_config returns {type(values).__name__}; it is to return default_config(), changed")
        values = config_dict.ConfigDict(dataclasses.asdict(_build(Config, values.to_dict(), "")))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{path}{_line(error, spec.origin)}: {text}") from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        _assign(values, key, value, "")
    return config_from_dict(values.to_dict())


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and validates a `Config`; absent keys take their defaults.

    Raises:
      ConfigError: for an unknown key, a wrong type or an impossible combination.
    """
    config = _build(Config, values, "")
    validate(config)
    return config


def read_config(path: Path) -> Config:
    """Reads the `config.json` of a run.

    Raises:
      ConfigError: if it is not there or does not hold a valid configuration.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: {str(path.parent)!r} is not the workdir of a run") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds a {type(values).__name__}; the config of a run is a group of keys")
    try:
        return config_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _line(error: Exception, path: str) -> str:
    """Where in the file at `path` the error arose, as `:line`."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f":{lines[-1]}" if lines else ""


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        full = prefix + key
        if key not in fields:
            raise ConfigError(_unknown("", full, list(_keys(default_config()))))
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                known = _known_in(full, list(_keys(default_config())))
                raise ConfigError(f"{full}={value!r} must be a group of keys, not {type(value).__name__}; {known}")
            built[key] = _build(kind, value, f"{full}.")
        elif kind is float and type(value) is int:
            built[key] = float(value)
        elif type(value) is not kind:
            raise ConfigError(f"{full}={value!r} must be {kind.__name__}, not {type(value).__name__}")
        else:
            built[key] = value
    return cls(**built)


def _assign(values: config_dict.ConfigDict, key: str, text: str, what: str) -> None:
    """Sets `key` (dotted) of `values` to `text`, parsed as the type of the value that stands there."""
    known = list(_keys(values))
    if key not in known:
        raise ConfigError(_unknown(what, key, known))
    *path, name = key.split(".")
    for part in path:
        values = values[part]
    kind = type(values[name])
    if kind is config_dict.ConfigDict:
        raise ConfigError(f"{what or 'config '}key {key!r} is a group of keys; {_known_in(key, known)}")
    try:
        values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{what}{key}={text!r} must be {kind.__name__}") from None


def _keys(values: config_dict.ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every key, dotted; groups too."""
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, config_dict.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _unknown(what: str, key: str, known: Sequence[str]) -> str:
    """The likest key is one of the same name, else one of the same group, else any where the group is unknown."""
    group, _, name = key.rpartition(".")
    siblings = _names_in(group, known)
    near = difflib.get_close_matches(key, [other for other in known if other.rpartition(".")[2] == name], 1, 0)
    if not near and siblings:
        near = [f"{group}.{name}".lstrip(".") for name in difflib.get_close_matches(name, siblings, 1, 0.5)]
    elif not near:
        near = difflib.get_close_matches(key, known, 1)
    ways_out = [f"did you mean {near[0]!r}?"] if near else []
    if not near or (group and siblings):
        ways_out.append(_known_in(group, known))
    return f"{what or 'config '}key {key!r} is unknown; {' '.join(ways_out)}"


def _known_in(group: str, known: Sequence[str]) -> str:
    names = _names_in(group, known)
    return f"known in {group}: {', '.join(names)}" if group and names else f"known: {', '.join(_names_in('', known))}"


def _names_in(group: str, known: Sequence[str]) -> list[str]:
    return [name for parent, _, name in (key.rpartition(".") for key in known) if parent == group]
