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
from attnres_jax.pattern import expand


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
    """none, llama3 (Llama 3.1) or yarn (the DeepSeek family): `layers/rotary.py`."""
    factor: float = 8.0
    """What slow frequencies are divided by."""
    original_length: int = 8192
    """Tokens of the context trained on."""
    low_frequency_factor: float = 1.0
    """llama3: like the next."""
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    """yarn: like the next three."""
    beta_slow: float = 1.0
    mscale: float = 0.0
    """0: not given."""
    mscale_all_dim: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention, where `attention_layers` has it: `layers/mla.py`."""

    latent_dim: int = 32
    nope_dim: int = 32
    """Of a head's key from the latent."""
    rope_dim: int = 16
    """Of the key part that all heads share."""
    value_dim: int = 32
    query_rank: int = 0
    """0: queries by one full projection."""
    rotary: bool = False
    rotary_interleaved: bool = False
    output_gate: bool = False
    latent_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDAConfig:
    """Kimi Delta Attention, where `attention_layers` has it: `layers/kda.py`."""

    num_heads: int = 0
    """0: the model's."""
    head_dim: int = 32
    """Of keys and of values."""
    conv_size: int = 4
    gate_lower_bound: float = 0.0
    """Smallest log decay of a step, negative (Kimi K3: -5); 0: the unbounded gate of Kimi Linear."""
    full_rank_gate: bool = False
    """The output gate from one matrix (Kimi K3), not from a low-rank pair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts, where `mlp_layers` has it: `layers/moe.py`."""

    num_experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 128
    num_shared: int = 1
    """Experts that every token takes."""
    shared_width: int = 0
    """Of one of them; 0: `expert_width`."""
    router_activation: str = "sigmoid"
    """sigmoid or softmax."""
    renormalise: bool = True
    """Divide the weights of the chosen experts by their sum."""
    scaling: float = 1.0
    """What the weights are multiplied with at last."""
    num_groups: int = 1
    top_groups: int = 1
    """A token chooses within so many of `num_groups` groups of experts."""
    correction_bias: bool = True
    """Whether the choice of experts has a score correction, which training moves: `training.router_bias_rate`."""
    biased_weights: bool = False
    """The score correction enters the weights too, as in Kimi Linear's remote code at Hugging Face."""
    latent_width: int = 0
    """LatentMoE (Kimi K3): what experts read and write; 0: the model's width."""
    latent_norm: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder."""

    attention_layers: str = "gqa"
    """Pattern of kinds over the layers, of gqa, mla and kda: `kda*3,mla` is repeated to the end; see `pattern.py`."""
    mlp_layers: str = "swiglu"
    """Pattern of swiglu and moe: `swiglu,moe*` is one dense layer, then experts."""
    vocab_size: int = 4096
    width: int = 128
    num_layers: int = 8
    """Transformer layers; each holds two sublayers."""
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 0
    """0: width / num_heads."""
    mlp_width: int = 384
    """Of the layers without experts."""
    activation: str = "silu"
    """Of all feed-forward layers: silu, or situ (Kimi K3)."""
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
    """Attention kernel of gqa: auto, xla or cudnn."""
    experts: str = "auto"
    """How the experts are multiplied: auto, ragged, sorted or dense; see `layers/experts.py`."""
    mla: MLAConfig = MLAConfig()
    kda: KDAConfig = KDAConfig()
    moe: MoEConfig = MoEConfig()
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
    router_balance_loss: float = 1e-4
    """Weight of the experts' sequence-wise balance loss (DeepSeek-V3), a mean over the layers that have experts."""
    router_z_loss: float = 0.0
    """Weight of the routers' squared log-partition (ST-MoE), a mean over layers."""
    router_bias_rate: float = 1e-3
    """Step of the score corrections that keep the experts' load even (Wang et al., 2024; Moonlight, appendix C)."""
    router_bias_until: float = 0.97
    """Share of the steps after which the score corrections stay as they are (DeepSeek-V3: the last 3 %)."""
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
class MeshConfig:
    """Devices by axis: `parallel/mesh.py`. Their product is the number of devices; one axis may be -1, all the rest."""

    data: int = -1
    """Parts of the batch, on each the whole model."""
    fsdp: int = 1
    """Parts of the batch, and of every parameter."""
    tensor: int = 1
    """Parts of the heads and feed-forward channels; between the matmuls, of the sequence."""
    expert: int = 1
    """Parts of the batch, and of the experts."""
    stage: int = 1
    """Parts of the layers."""
    context: int = 1
    """Parts of the sequence."""


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
    mesh: MeshConfig = MeshConfig()


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
    _not_negative("training", training, "z_loss", "router_balance_loss", "router_z_loss", "router_bias_rate")
    if not 0 <= training.router_bias_until <= 1:
        raise ConfigError(f"training.router_bias_until={training.router_bias_until} must be from 0 to 1")
    _validate_mesh(config.mesh)
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
    _one_of("model.dtype", model.dtype, ("float32", "bfloat16"))
    _one_of("model.remat", model.remat, tuple(REMAT_POLICIES))
    _one_of("model.attention", model.attention, ("auto", "xla", "cudnn"))
    _one_of("model.experts", model.experts, ("auto", "ragged", "sorted", "dense"))
    _one_of("model.activation", model.activation, ("silu", "situ"))
    for key, known in (("attention_layers", ATTENTION_KINDS), ("mlp_layers", MLP_KINDS)):
        try:
            expand(getattr(model, key), model.num_layers, known)
        except ValueError as error:
            raise ConfigError(f"model.{key}={getattr(model, key)!r}: {error}") from None
    kinds = {*attention_kinds(model), *mlp_kinds(model)}
    if "gqa" in kinds:
        _validate_gqa(model)
    if "mla" in kinds:
        _validate_mla(model, rotary_dim=head_dim(model) if "gqa" in kinds else model.mla.rope_dim)
    if "kda" in kinds:
        _positive("model.kda", model.kda, "head_dim", "conv_size")
        _not_negative("model.kda", model.kda, "num_heads")
        if model.kda.gate_lower_bound > 0:
            raise ConfigError(
                f"model.kda.gate_lower_bound={model.kda.gate_lower_bound} must be negative, or 0 for the unbounded "
                f"gate; nearest: {-model.kda.gate_lower_bound}"
            )
    if "moe" in kinds:
        _validate_moe(model.moe)
    _validate_rope_scaling(model.rope_scaling)
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


def head_dim(model: ModelConfig) -> int:
    """Width of an attention head of gqa."""
    return model.head_dim or model.width // model.num_heads


ATTENTION_KINDS = ("gqa", "mla", "kda")
MLP_KINDS = ("swiglu", "moe")


def attention_kinds(model: ModelConfig) -> list[str]:
    """The kind of attention in every layer, of `ATTENTION_KINDS`."""
    return expand(model.attention_layers, model.num_layers, ATTENTION_KINDS)


def mlp_kinds(model: ModelConfig) -> list[str]:
    """The kind of feed-forward sublayer in every layer, of `MLP_KINDS`."""
    return expand(model.mlp_layers, model.num_layers, MLP_KINDS)


def _validate_gqa(model: ModelConfig) -> None:
    if not model.head_dim and model.width % model.num_heads:
        raise ConfigError(
            f"model.width={model.width} is not divisible by model.num_heads={model.num_heads}; "
            f"nearest: model.num_heads={_nearest_divisor(model.width, model.num_heads)}"
        )
    width = head_dim(model)
    if width < 2 or width % 2:
        raise ConfigError(
            f"model.head_dim={width} must be even and positive for the rotary embedding; "
            f"nearest: model.head_dim={max(2, width + width % 2)}"
        )
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads={model.num_kv_heads}; "
            f"nearest: model.num_kv_heads={_nearest_divisor(model.num_heads, model.num_kv_heads)}"
        )


def _validate_mla(model: ModelConfig, rotary_dim: int) -> None:
    mla = model.mla
    _positive("model.mla", mla, "latent_dim", "nope_dim", "rope_dim", "value_dim", "latent_eps")
    _not_negative("model.mla", mla, "query_rank")
    if mla.rotary and (mla.rope_dim % 2 or mla.rope_dim != rotary_dim):
        near = rotary_dim if mla.rope_dim != rotary_dim else mla.rope_dim + 1
        raise ConfigError(
            f"model.mla.rope_dim={mla.rope_dim} must be even, and the head width of gqa layers where there are any, "
            f"with model.mla.rotary=true; nearest: model.mla.rope_dim={near}"
        )


def _validate_moe(moe: MoEConfig) -> None:
    _positive("model.moe", moe, "num_experts", "experts_per_token", "expert_width", "scaling")
    _positive("model.moe", moe, "num_groups", "top_groups")
    _not_negative("model.moe", moe, "num_shared", "shared_width", "latent_width")
    _one_of("model.moe.router_activation", moe.router_activation, ("sigmoid", "softmax"))
    if moe.experts_per_token > moe.num_experts:
        raise ConfigError(
            f"model.moe.experts_per_token={moe.experts_per_token} is more than model.moe.num_experts="
            f"{moe.num_experts}; nearest: model.moe.experts_per_token={moe.num_experts}"
        )
    if moe.num_experts % moe.num_groups:
        raise ConfigError(
            f"model.moe.num_experts={moe.num_experts} is not divisible by model.moe.num_groups={moe.num_groups}; "
            f"nearest: model.moe.num_groups={_nearest_divisor(moe.num_experts, moe.num_groups)}"
        )
    size = moe.num_experts // moe.num_groups
    if moe.top_groups > moe.num_groups or moe.top_groups * size < moe.experts_per_token:
        raise ConfigError(
            f"model.moe.top_groups={moe.top_groups} groups of {size} experts cannot hold model.moe.experts_per_token="
            f"{moe.experts_per_token}, or are more than model.moe.num_groups={moe.num_groups}; "
            f"nearest: model.moe.top_groups={min(moe.num_groups, -(-moe.experts_per_token // size))}"
        )


def _validate_mesh(mesh: MeshConfig) -> None:
    """What no number of devices makes possible; the rest is `parallel.mesh_sizes`'s."""
    sizes = dataclasses.asdict(mesh)
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{axis}={size} must be positive, or -1 for all other devices; nearest: 1")
    filled = [axis for axis, size in sizes.items() if size == -1]
    if len(filled) > 1:
        raise ConfigError(f"mesh.{filled[1]}=-1: mesh.{filled[0]} is -1 too, and one axis alone can be; nearest: 1")


def _validate_rope_scaling(scaling: RopeScalingConfig) -> None:
    _one_of("model.rope_scaling.kind", scaling.kind, ("none", "llama3", "yarn"))
    _positive("model.rope_scaling", scaling, "factor", "low_frequency_factor", "original_length")
    _positive("model.rope_scaling", scaling, "beta_fast", "beta_slow")
    _not_negative("model.rope_scaling", scaling, "mscale", "mscale_all_dim")
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        raise ConfigError(
            f"model.rope_scaling.high_frequency_factor={scaling.high_frequency_factor} must be above "
            f"model.rope_scaling.low_frequency_factor={scaling.low_frequency_factor}"
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
