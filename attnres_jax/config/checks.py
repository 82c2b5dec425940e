"""Impossible settings, each refused in one line that names the key, its value and the nearest that works."""

import dataclasses
import difflib
import math
from collections.abc import Collection
from typing import Any

from attnres_jax.config.schema import (
    ATTENTION_KINDS,
    MLP_KINDS,
    SCHEDULES,
    TRANSPORTS,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RopeScalingConfig,
    attention_kinds,
    head_dim,
    mlp_kinds,
)
from attnres_jax.depth import REMAT_POLICIES, RULES, make_rule
from attnres_jax.errors import ConfigError
from attnres_jax.layers import softmax_attention
from attnres_jax.layers.expert_exchange import EXCHANGES
from attnres_jax.layers.experts import IMPLEMENTATIONS
from attnres_jax.layers.mlp import GATES
from attnres_jax.layers.router import SCORES
from attnres_jax.pattern import expand


def validate(config: Config) -> None:
    """Refuses impossible combinations.

    Raises:
      ConfigError: naming the key, its value, what is allowed and the nearest valid setting.
    """
    model, data, training, optimizer = config.model, config.data, config.training, config.optimizer
    validate_model(model)
    if not 0 <= config.seed < 2**32:  # of others, JAX would take the last 32 bits
        raise ConfigError(f"seed={config.seed} must be from 0 to {2**32 - 1}")
    one_of("data.source", data.source, ("stdlib", "text"))
    _positive("data", data, "sequence_length", "batch_size")
    _positive("training", training, "steps", "accumulation", "log_every", "eval_every", "eval_sequences")
    _positive("training", training, "checkpoint_every", "keep_checkpoints", "process_timeout")
    _positive("optimizer", optimizer, "learning_rate", "eps")
    if not optimizer.clip_norm > 0:
        raise ConfigError(f"optimizer.clip_norm={optimizer.clip_norm} must be positive; inf does not clip")
    if optimizer.final_learning_rate > optimizer.learning_rate:
        raise ConfigError(
            f"optimizer.final_learning_rate={optimizer.final_learning_rate:g} is above optimizer.learning_rate="
            f"{optimizer.learning_rate:g}; nearest: optimizer.final_learning_rate={optimizer.learning_rate:g}"
        )
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, key) < 1:
            raise ConfigError(f"optimizer.{key}={getattr(optimizer, key)} must be at least 0 and below 1")
    _positive("metrics", config.metrics, "every")
    _not_negative("optimizer", optimizer, "final_learning_rate", "warmup_steps", "weight_decay")
    _not_negative("optimizer", optimizer, *(key for key in vars(optimizer) if key.startswith("depth_")))
    _not_negative("training", training, "z_loss", "router_balance_loss", "router_z_loss", "router_bias_rate")
    if not 0 <= training.router_bias_until <= 1:
        raise ConfigError(f"training.router_bias_until={training.router_bias_until} must be from 0 to 1")
    _validate_mesh(config.mesh)
    one_of("pipeline.schedule", config.pipeline.schedule, SCHEDULES)
    one_of("pipeline.transport", config.pipeline.transport, TRANSPORTS)
    _positive("pipeline", config.pipeline, "virtual_stages")
    if not 1 <= data.heldout_percent <= 50:
        raise ConfigError(f"data.heldout_percent={data.heldout_percent} must be from 1 to 50")
    if data.source == "text" and not data.files:
        raise ConfigError("data.source='text' needs data.files, a glob such as 'corpus/*.txt'")
    if data.source != "text" and data.files:
        raise ConfigError(f"data.files={data.files!r} is read only with data.source='text', not {data.source!r}")
    if training.init_from and not data.tokenizer:
        raise ConfigError(
            f"training.init_from={training.init_from!r} does not know the tokens of a tokenizer trained on the text; "
            f"nearest: data.tokenizer={training.init_from!r}"
        )
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
    one_of("model.dtype", model.dtype, ("float32", "bfloat16"))
    one_of("model.remat", model.remat, REMAT_POLICIES)
    one_of("model.attention", model.attention, softmax_attention.IMPLEMENTATIONS)
    one_of("model.experts", model.experts, IMPLEMENTATIONS)
    one_of("model.expert_exchange", model.expert_exchange, EXCHANGES)
    _not_negative("model", model, "expert_capacity")
    if model.expert_exchange == "routed" and model.experts == "dense":
        raise ConfigError("model.expert_exchange='routed' needs rows sorted by expert; nearest: model.experts='auto'")
    one_of("model.activation", model.activation, GATES)
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
        if not math.isfinite(model.kda.gate_lower_bound):
            raise ConfigError(f"model.kda.gate_lower_bound={model.kda.gate_lower_bound} must be finite; 0: unbounded")
        if model.kda.gate_lower_bound > 0:
            raise ConfigError(
                f"model.kda.gate_lower_bound={model.kda.gate_lower_bound} must be negative, or 0 for the unbounded "
                f"gate; nearest: {-model.kda.gate_lower_bound}"
            )
    if "moe" in kinds:
        _validate_moe(model.moe)
    _validate_rope_scaling(model.rope_scaling)
    one_of("model.depth.rule", model.depth.rule, RULES)
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
    one_of("model.moe.router_activation", moe.router_activation, SCORES)
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
    one_of("model.rope_scaling.kind", scaling.kind, ("none", "llama3", "yarn"))
    _positive("model.rope_scaling", scaling, "factor", "low_frequency_factor", "original_length")
    _positive("model.rope_scaling", scaling, "beta_fast", "beta_slow")
    _not_negative("model.rope_scaling", scaling, "mscale", "mscale_all_dim")
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        raise ConfigError(
            f"model.rope_scaling.high_frequency_factor={scaling.high_frequency_factor} must be above "
            f"model.rope_scaling.low_frequency_factor={scaling.low_frequency_factor}"
        )


def one_of(key: str, value: str, allowed: Collection[str]) -> None:
    """Refuses another value, with the nearest where one is alike.

    Raises:
      ConfigError: naming the key, its value and what is allowed.
    """
    if value not in allowed:
        near = "".join(f"; nearest: {name!r}" for name in difflib.get_close_matches(value, allowed, 1))
        raise ConfigError(f"{key}={value!r} is unknown; known: {', '.join(allowed)}{near}")


def _nearest_divisor(number: int, to: int) -> int:
    return min((n for n in range(1, number + 1) if not number % n), key=lambda n: abs(n - to))


def _not_negative(group: str, values: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        if not 0 <= value < math.inf:
            wrong = "must be finite" if value == math.inf else "must not be negative"
            raise ConfigError(f"{group}.{key}={value} {wrong}")


def _positive(group: str, values: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        if not 0 < value < math.inf:
            raise ConfigError(f"{group}.{key}={value} must be {'finite' if value == math.inf else 'positive'}")
