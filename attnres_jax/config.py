"""Configuration: what can be set, and the one door through which a config file becomes frozen dataclasses."""

import dataclasses
import difflib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from attnres_jax.depth import REMAT_POLICIES, RULES, Options, make_rule
from attnres_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig(Options):
    """Which rule decides what a sublayer reads from the earlier ones, and its options."""

    rule: str = "block"
    """A name in `attnres_jax.depth.RULES`."""
    block_size: int = 4
    """Sublayers in a block (two per transformer layer): 1 or even. Where a rule has no blocks it is only a schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """How rotary frequencies are changed for contexts longer than the one trained on."""

    kind: str = "none"
    """none or llama3 (Llama 3.1); the other keys are of llama3: `layers/rotary.py`."""
    factor: float = 8.0
    """What slow frequencies are divided by."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192
    """Tokens of the context trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder."""

    vocab_size: int = 4096
    width: int = 128
    num_layers: int = 8
    """Transformer layers; each holds two sublayers."""
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 0
    """0: width / num_heads."""
    mlp_width: int = 384
    max_length: int = 256
    """Longest sequence, in tokens."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    norm_eps: float = 1e-6
    qk_norm: bool = True
    """RMS-normalise queries and keys of the attention before rotation."""
    tie_embeddings: bool = True
    dtype: str = "float32"
    """Of activations and matmuls: float32 or bfloat16. Parameters are always float32."""
    remat: str = "none"
    """What a block keeps for its backward pass: everything (none), matmul outputs (dots), its input only (full)."""
    attention: str = "auto"
    """Attention kernel: auto, xla or cudnn."""
    depth: DepthConfig = DepthConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, its tokens and how they are packed."""

    source: str = "stdlib"
    """stdlib (the source of the running Python's standard library) or text (the files that `files` matches)."""
    files: str = ""
    """With source=text: a glob of .txt (one document a file) or .jsonl files (a "text" field a line)."""
    heldout_percent: int = 5
    """Share of the documents, chosen by hash of their name, kept for evaluation."""
    sequence_length: int = 256
    batch_size: int = 8
    """Sequences in a batch, over all processes and all accumulation steps."""
    cache_dir: str = ""
    """Where the tokenizer and the tokens are kept; empty: $ATTNRES_CACHE, else ~/.cache/attnres_jax."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    warmup_steps: int = 20
    weight_decay: float = 0.1
    """On matrices only: norms do not decay, and depth parameters as `depth_weight_decay` says."""
    depth_weight_decay: float = 0.0
    """On every parameter of the depth rule, matrix or not."""
    depth_query_lr_multiplier: float = 1.0
    """The learning rate (and decay) of depth queries over everybody else's."""
    depth_key_scale_lr_multiplier: float = 1.0
    """The same of depth key scales. 0 leaves them as they are."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop."""

    steps: int = 300
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the output softmax."""
    log_every: int = 10
    eval_every: int = 100
    eval_sequences: int = 64
    """Size of the fixed held-out set, in sequences."""
    checkpoint_every: int = 100
    keep_checkpoints: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is measured beside the step's own metrics."""

    depth: bool = False
    """Whether outputs, their gradients and depth weights are measured by sublayer: `training/diagnostics.py`."""
    every: int = 50
    """Steps between two such measurements."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    name: str = "tiny"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    metrics: MetricsConfig = MetricsConfig()


def default_config() -> config_dict.ConfigDict:
    """Every key with its default, for a config file to change and return."""
    return config_dict.ConfigDict(dataclasses.asdict(Config()))


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
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config(argument)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, SyntaxError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
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
        return config_from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: {str(path.parent)!r} is not the workdir of a run") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The configuration as `{"model.depth.rule": "block", ...}`."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = prefix + field.name
        flat.update(flatten(value, key + ".") if dataclasses.is_dataclass(value) else {key: value})
    return flat


def validate(config: Config) -> None:
    """Refuses impossible combinations.

    Raises:
      ConfigError: naming the key, its value, what is allowed and the nearest valid setting.
    """
    model, data, training, optimizer = config.model, config.data, config.training, config.optimizer
    validate_model(model)
    _one_of("data.source", data.source, ("stdlib", "text"))
    _positive("data", data, "sequence_length", "batch_size")
    _positive("training", training, "steps", "accumulation", "log_every", "eval_every", "eval_sequences")
    _positive("training", training, "checkpoint_every", "keep_checkpoints")
    _positive("optimizer", optimizer, "learning_rate", "eps", "clip_norm")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, key) < 1:
            raise ConfigError(f"optimizer.{key}={getattr(optimizer, key)} must be at least 0 and below 1")
    _positive("metrics", config.metrics, "every")
    _not_negative("optimizer", optimizer, "final_learning_rate", "warmup_steps", "weight_decay", "depth_weight_decay")
    _not_negative("optimizer", optimizer, "depth_query_lr_multiplier", "depth_key_scale_lr_multiplier")
    _not_negative("training", training, "z_loss")
    if not 1 <= data.heldout_percent <= 50:
        raise ConfigError(f"data.heldout_percent={data.heldout_percent} must be from 1 to 50")
    if data.source == "text" and not data.files:
        raise ConfigError("data.source='text' needs data.files, a glob such as 'corpus/*.txt'")
    if data.source != "text" and data.files:
        raise ConfigError(f"data.files={data.files!r} is read only with data.source='text', not {data.source!r}")
    if data.sequence_length > model.max_length:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} is longer than model.max_length={model.max_length}; "
            f"set data.sequence_length={model.max_length} or raise model.max_length"
        )
    if data.batch_size % training.accumulation:
        near = math.ceil(data.batch_size / training.accumulation) * training.accumulation
        raise ConfigError(
            f"data.batch_size={data.batch_size} is not divisible by training.accumulation={training.accumulation}; "
            f"nearest: data.batch_size={near}"
        )
    if optimizer.warmup_steps >= training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be below training.steps={training.steps}; "
            f"nearest: optimizer.warmup_steps={training.steps - 1}"
        )


def validate_model(model: ModelConfig) -> None:
    """Refuses a model that cannot be built.

    Raises:
      ConfigError: naming the key, its value, what is allowed and the nearest valid setting.
    """
    _positive("model", model, "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width")
    _positive("model", model, "max_length", "rope_theta", "norm_eps")
    _one_of("model.rope_scaling.kind", model.rope_scaling.kind, ("none", "llama3"))
    _positive("model.rope_scaling", model.rope_scaling, "factor", "low_frequency_factor", "original_length")
    if model.rope_scaling.high_frequency_factor <= model.rope_scaling.low_frequency_factor:
        raise ConfigError(
            f"model.rope_scaling.high_frequency_factor={model.rope_scaling.high_frequency_factor} must be above "
            f"model.rope_scaling.low_frequency_factor={model.rope_scaling.low_frequency_factor}"
        )
    _one_of("model.dtype", model.dtype, ("float32", "bfloat16"))
    _one_of("model.remat", model.remat, tuple(REMAT_POLICIES))
    _one_of("model.attention", model.attention, ("auto", "xla", "cudnn"))
    if not model.head_dim and model.width % model.num_heads:
        raise ConfigError(
            f"model.width={model.width} is not divisible by model.num_heads={model.num_heads}; "
            f"nearest: model.num_heads={_nearest_divisor(model.width, model.num_heads)}"
        )
    head_dim = model.head_dim or model.width // model.num_heads
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(
            f"model.head_dim={head_dim} must be even and positive for the rotary embedding; "
            f"nearest: model.head_dim={max(2, head_dim + head_dim % 2)}"
        )
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads={model.num_kv_heads}; "
            f"nearest: model.num_kv_heads={_nearest_divisor(model.num_heads, model.num_kv_heads)}"
        )
    _one_of("model.depth.rule", model.depth.rule, tuple(RULES))
    size, sublayers = model.depth.block_size, 2 * model.num_layers
    if size < 1 or (size > 1 and size % 2) or size > sublayers:
        near = min(max(size, 1), sublayers)
        near = near if near == 1 else near - near % 2
        raise ConfigError(
            f"model.depth.block_size={size} sublayers does not fit {sublayers} sublayers: it is 1 or even "
            f"(a block begins before an attention sublayer) and at most {sublayers}; "
            f"nearest: model.depth.block_size={near}"
        )
    try:
        make_rule(model.depth.rule, size, model.norm_eps, model.depth)
    except ValueError as error:
        raise ConfigError(f"model.depth.{error}") from None
    if model.width % model.depth.heads:
        raise ConfigError(
            f"model.width={model.width} is not divisible by model.depth.heads={model.depth.heads}; "
            f"nearest: model.depth.heads={_nearest_divisor(model.width, model.depth.heads)}"
        )


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(_unknown("", prefix + key, [prefix + name for name in fields]))
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{key}={value!r} must be a group of keys, not {type(value).__name__}")
            built[key] = _build(kind, value, f"{prefix}{key}.")
        elif kind is float and type(value) is int:
            built[key] = float(value)
        elif type(value) is not kind:
            raise ConfigError(f"{prefix}{key}={value!r} must be {kind.__name__}, not {type(value).__name__}")
        else:
            built[key] = value
    return cls(**built)


def _assign(values: config_dict.ConfigDict, key: str, text: str, what: str) -> None:
    """Sets `key` (dotted) of `values` to `text`, parsed as the type of the value that stands there."""
    known = list(_leaves(values))
    if key not in known:
        raise ConfigError(_unknown(what, key, known))
    *path, name = key.split(".")
    for part in path:
        values = values[part]
    kind = type(values[name])
    try:
        values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{what}{key}={text!r} must be {kind.__name__}") from None


def _leaves(values: config_dict.ConfigDict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, config_dict.ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _unknown(what: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.4) or difflib.get_close_matches(
        key.rpartition(".")[2], [name.rpartition(".")[2] for name in known], 1, 0.4
    )
    full = next((name for name in known if near and (name == near[0] or name.endswith("." + near[0]))), None)
    return f"{what or 'config '}key {key!r} is unknown; " + (
        f"did you mean {full!r}?" if full else f"known: {', '.join(known)}"
    )


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1, 0)
        raise ConfigError(f"{key}={value!r} is unknown; known: {', '.join(allowed)}; nearest: {near[0]!r}")


def _nearest_divisor(number: int, to: int) -> int:
    return min((n for n in range(1, number + 1) if not number % n), key=lambda n: abs(n - to))


def _not_negative(group: str, values: Any, *keys: str) -> None:
    for key in keys:
        if not getattr(values, key) >= 0:
            raise ConfigError(f"{group}.{key}={getattr(values, key)} must not be negative")


def _positive(group: str, values: Any, *keys: str) -> None:
    for key in keys:
        if not getattr(values, key) > 0:
            raise ConfigError(f"{group}.{key}={getattr(values, key)} must be positive")
