"""A model family: how its Hugging Face `config.json` and a `ModelConfig` say the same thing, and its presets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from attnres_jax.config import (
    DepthConfig,
    ModelConfig,
    MoEConfig,
    RopeScalingConfig,
    attention_kinds,
    flatten,
    head_dim,
    kda_heads,
    mlp_kinds,
    validate_model,
)
from attnres_jax.errors import ConfigError
from attnres_jax.pattern import shorten

REQUIRED = object()
"""The default of a key that has none."""
COUNTS = {"num_layers": range(1, 10_001), "moe.num_experts": range(65_537)}
"""What a `config.json` may ask for: a damaged number is to be refused, not built."""


class NoPlaceError(ConfigError):
    """A model that the format of a family has no place for."""

    def __init__(self, family: str, lost: Mapping[str, tuple[Any, Any]]):
        given, needed = (", ".join(f"model.{name}={pair[i]!r}" for name, pair in lost.items()) for i in range(2))
        have = "has" if len(lost) == 1 else "have"
        super().__init__(f"{given} {have} no place in the {family} format, which needs {needed}")
        self.lost = lost
        """By setting: what the model has, and what it would become."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting under its two names; `ours` may lie in a group, as in `moe.num_experts`.

    `default` stands for an absent or null key: a value, a function of the whole `config.json`, or `REQUIRED`. `null` is
    the value of ours that is written as null.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    null: Any = None


@dataclasses.dataclass(frozen=True)
class Preset:
    """A released size: where it is, the settings of its `config.json`, and how many parameters it has."""

    repository: str
    parameters: int
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything about a family but its tensors, which are in `interop/tables.py`.

    Attributes:
      model_type: as in `config.json`.
      architecture: the class that `config.json` names.
      keys: settings that both sides have.
      constants: settings of ours that the family fixes.
      expected: settings of theirs that are not supported at another value; absent ones count as the first allowed.
      presets: the released sizes.
      read_more: further settings of ours from a `config.json`.
      write_more: the inverse.
      nested: where the settings of the text model lie in a `config.json` that has more, and their `model_type` there.
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    constants: Mapping[str, Any]
    expected: Mapping[str, tuple[Any, ...]]
    presets: Mapping[str, Preset]
    read_more: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    write_more: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    nested: tuple[str, str] | None = None

    def read(self, values: Mapping[str, Any]) -> ModelConfig:
        """The model that a `config.json` describes.

        Raises:
          ConfigError: naming the setting that is missing, of a wrong type, or not supported.
        """
        values = self.text_settings(values)
        for name, allowed in self.expected.items():
            if values.get(name, allowed[0]) not in allowed:
                raise ConfigError(f"{name}={values[name]!r} is not supported; supported: {_words(allowed)}")
        ours = dict(self.constants)
        for key in self.keys:
            value = ours[key.ours] = read_key(key, values)
            if key.ours in COUNTS and value not in COUNTS[key.ours]:
                allowed = COUNTS[key.ours]
                raise ConfigError(f"{key.theirs}={value} is not one of {allowed[0]} to {allowed[-1]}")
        ours |= read_rope(values) | self.read_more(values)
        ours["dtype"] = _dtype(values)
        ours["depth"] = read_depth(values, ours["num_layers"])
        config = _assemble(ours)
        validate_model(config)
        return config

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of a model.

        Raises:
          NoPlaceError: if the family has no place for some of its settings.
          ConfigError: if it cannot be built, or the format cannot say it at all.
        """
        values: dict[str, Any] = {}
        for key in self.keys:
            value = _get(config, key.ours)
            values[key.theirs] = None if value == key.null else value
        if "head_dim" in values:
            values["head_dim"] = head_dim(config)
        values |= {name: allowed[0] for name, allowed in self.expected.items()}
        values |= write_rope(config) | self.write_more(config)
        values["dtype"] = config.dtype
        values |= write_depth(config.depth)
        if self.nested:
            values = {self.nested[0]: {"model_type": self.nested[1]} | values}
        values = {"architectures": [self.architecture], "model_type": self.model_type} | values
        lost = differences(config, self.read(values))
        if lost:
            raise NoPlaceError(self.model_type, lost)
        return values

    def text_settings(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a `config.json` that describes the text model.

        Raises:
          ConfigError: if it is not there.
        """
        if self.nested is None:
            return values
        text = values.get(self.nested[0])
        if not isinstance(text, Mapping):
            raise ConfigError(f"{self.nested[0]} is missing")
        return text


def differences(left: ModelConfig, right: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The settings, of those that `RUNTIME` does not list, in which two models differ: none if they agree."""
    ours, theirs = (flatten(canonical(config)) for config in (left, right))
    return {
        name: (value, theirs[name])
        for name, value in ours.items()
        if name.partition(".")[0] not in RUNTIME and value != theirs[name]
    }


def canonical(config: ModelConfig) -> ModelConfig:
    """The same model with every setting said in one way, and those that no layer reads at their defaults."""
    default, attention, mlps = ModelConfig(), attention_kinds(config), mlp_kinds(config)
    changes: dict[str, Any] = {"attention_layers": shorten(attention), "mlp_layers": shorten(mlps)}
    if "gqa" in attention:
        changes["head_dim"] = head_dim(config)
    else:
        changes |= {key: getattr(default, key) for key in ("num_kv_heads", "head_dim", "qk_norm")}
    if "gqa" not in attention and not ("mla" in attention and config.mla.rotary):
        changes |= {key: getattr(default, key) for key in ("rope_theta", "rope_scaling")}
    if "kda" in attention:
        changes["kda"] = dataclasses.replace(config.kda, num_heads=kda_heads(config))
    if "moe" in mlps:
        changes["moe"] = _canonical_moe(config.moe)
    if "swiglu" not in mlps:
        changes["mlp_width"] = default.mlp_width
    if not config.mla.rotary:
        changes["mla"] = dataclasses.replace(config.mla, rotary_interleaved=False)
    unused = {"mla": attention, "kda": attention, "moe": mlps}
    changes |= {kind: getattr(default, kind) for kind, kinds in unused.items() if kind not in kinds}
    return dataclasses.replace(config, **changes)


def _canonical_moe(moe: MoEConfig) -> MoEConfig:
    count, rest = divmod(moe.all_shared_width, moe.expert_width)  # shared experts are one MLP, however it is counted
    changes = (
        {"num_shared": 1, "shared_width": moe.all_shared_width} if rest else {"num_shared": count, "shared_width": 0}
    )
    if not moe.latent_width:
        changes["latent_norm"] = MoEConfig().latent_norm
    if moe.num_groups == moe.top_groups:
        changes |= {"num_groups": 1, "top_groups": 1}
    return dataclasses.replace(moe, **changes)


def read_depth(values: Mapping[str, Any], num_layers: int) -> DepthConfig:
    """The depth rule: `attn_res_block_size` counts transformer layers, two sublayers each; without it, `residual`.

    A block longer than the stack is the whole stack. `attn_res_sum` is this package's own (`Options.sum_sources`).
    """
    size = values.get("attn_res_block_size")
    if size is None:
        return DepthConfig(rule="residual", block_size=2)
    if type(size) is not int or size < 1:
        raise ConfigError(f"attn_res_block_size={size!r} must be a positive number of transformer layers, or null")
    sums = values.get("attn_res_sum", False)
    if type(sums) is not bool:
        raise ConfigError(f"attn_res_sum={sums!r} must be true or false")
    return DepthConfig(rule="block", block_size=2 * min(size, num_layers), sum_sources=sums)


def write_depth(depth: DepthConfig) -> dict[str, Any]:
    """The inverse.

    Raises:
      ConfigError: for a rule that the format cannot say.
    """
    if depth.rule == "residual":
        return {}
    expressible = DepthConfig(rule="block", block_size=depth.block_size, sum_sources=depth.sum_sources)
    if depth != expressible or depth.block_size % 2:
        raise ConfigError(
            f"model.depth.rule={depth.rule!r} with block_size={depth.block_size} and its options has no place in "
            "config.json, where attn_res_block_size counts whole layers; it can hold: residual, and block with an even "
            "block_size and default options"
        )
    return {"attn_res_block_size": depth.block_size // 2} | ({"attn_res_sum": True} if depth.sum_sources else {})


def read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    given = values.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ConfigError(f"{name}={given!r} is not supported; supported: one flat group")
    theta = _number("rope_theta", given.get("rope_theta", values.get("rope_theta", 10_000.0)))
    kind = given.get("rope_type", given.get("type", "default"))
    if _number("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)) != 1:
        raise ConfigError(f"partial_rotary_factor={given['partial_rotary_factor']} is not supported; supported: 1.0")
    if kind == "default":
        return {"rope_theta": theta}
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ConfigError(f"{name}.rope_type={kind!r} is not supported; supported: default, {', '.join(SCALINGS)}")
    if given.get("attention_factor") is not None:
        raise ConfigError(f"{name}.attention_factor={given['attention_factor']} is not supported; supported: null")
    if given.get("truncate", True) is not True:
        raise ConfigError(f"{name}.truncate={given['truncate']!r} is not supported; supported: true")
    required, optional = SCALINGS[kind]
    missing = [theirs for theirs in required.values() if theirs not in given]
    if missing:
        raise ConfigError(f"{name}.{missing[0]} is missing, with rope_type={kind!r}")
    original = given.get(ORIGINAL_LENGTH, values.get("max_position_embeddings"))
    if type(original) is not int:
        raise ConfigError(f"{name}.{ORIGINAL_LENGTH}={original!r} must be int")
    factors = {
        ours: _number(theirs, given[theirs])
        for ours, theirs in (required | optional).items()
        if given.get(theirs) is not None
    }
    scaling = RopeScalingConfig(kind=kind, original_length=original, **factors)
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The inverse, under the older names, which every version of transformers reads."""
    scaling = config.rope_scaling
    values = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if scaling.kind in SCALINGS:
        required, optional = SCALINGS[scaling.kind]
        values["rope_scaling"] = {"rope_type": scaling.kind, ORIGINAL_LENGTH: scaling.original_length} | {
            theirs: getattr(scaling, ours)
            for ours, theirs in (required | optional).items()
            if getattr(scaling, ours)  # 0 is not given
        }
    return values


ORIGINAL_LENGTH = "original_max_position_embeddings"
SCALINGS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "llama3": (
        {
            "factor": "factor",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
        },
        {},
    ),
    "yarn": (
        {"factor": "factor"},
        {name: name for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")},
    ),
}
"""For each `rope_type` its settings under our names and theirs: those it must have, and those it may."""

DECODER_KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("width", "hidden_size"),
    Key("num_layers", "num_hidden_layers"),
    Key("num_heads", "num_attention_heads"),
    Key("num_kv_heads", "num_key_value_heads", lambda values: values.get("num_attention_heads")),
    Key("mlp_width", "intermediate_size"),
    Key("norm_eps", "rms_norm_eps", 1e-6),
    Key("tie_embeddings", "tie_word_embeddings", False),
)
"""What the configs of all dense pre-norm decoders call the same; `head_dim` and the longest sequence have defaults that
differ."""


def read_key(key: Key, values: Mapping[str, Any]) -> Any:
    """The value of ours.

    Raises:
      ConfigError: if it is missing or of a wrong type.
    """
    value = values.get(key.theirs)
    if value is None:
        if key.default is REQUIRED:
            raise ConfigError(f"{key.theirs} is missing")
        value = key.default(values) if callable(key.default) else key.default
    kind = _kind(key.ours)
    if kind is float:
        return _number(key.theirs, value)
    if type(value) is not kind:
        raise ConfigError(f"{key.theirs}={value!r} must be {kind.__name__}")
    return value


def _dtype(values: Mapping[str, Any]) -> str:
    """Of activations. Half precision is not one of ours: such a model runs in float32, which is exact."""
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={dtype!r} is not supported; supported: float32, bfloat16, float16")
    return "bfloat16" if dtype == "bfloat16" else "float32"


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ConfigError(f"{name}={value!r} must be a number")
    return float(value)


def _kind(path: str) -> type:
    cls = ModelConfig
    for name in path.split("."):
        cls = {field.name: field.type for field in dataclasses.fields(cls)}[name]
    return cls


def _get(config: ModelConfig, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _assemble(values: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from settings by dotted name."""
    top = {path: value for path, value in values.items() if "." not in path}
    groups: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        if "." in path:
            group, _, name = path.partition(".")
            groups.setdefault(group, {})[name] = value
    for group, settings in groups.items():
        top[group] = dataclasses.replace(top.get(group, getattr(ModelConfig(), group)), **settings)
    return ModelConfig(**top)


RUNTIME = ("dtype", "remat", "attention", "experts", "expert_exchange", "expert_capacity", "depth")
"""How a model is run, and the depth rule, which `write_depth` answers for."""


def _words(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))
