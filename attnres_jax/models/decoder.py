"""The decoder: embedding, a stack of sublayers under a depth rule, final norm, head."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.arrays import INTEGERS, expect
from attnres_jax.config import ModelConfig, attention_kinds, head_dim, kda_heads, mlp_kinds
from attnres_jax.depth import Rule, Segment, depth_scan, make_rule
from attnres_jax.layers import (
    KDA,
    MLA,
    Context,
    Embedding,
    GroupedQueryAttention,
    MoE,
    RMSNorm,
    RouterReport,
    SwiGLU,
    make_context,
)
from attnres_jax.layers.rotary import Llama3Scaling, RopeScaling, YarnScaling
from attnres_jax.models.plan import cut, slots_of


class Decoder(nnx.Module):
    """A pre-norm language model whose sublayers know nothing of residuals, and whose depth rule nothing of sublayers.

    The parameters of all sublayers of a kind are one stack with a leading layer axis, the same for every depth rule.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, config.dtype, rngs=rngs)
        self.sublayers = nnx.Dict(
            {kind: _stack(MAKERS[kind], config, self.plan().count(kind), rngs) for kind in dict.fromkeys(self.plan())}
        )
        self.sites = self.rule().init_sites(len(self.plan()), config.width)
        self.final_norm = RMSNorm(config.width, config.norm_eps, config.dtype)
        self.head = (
            None if config.tie_embeddings else Embedding(config.vocab_size, config.width, config.dtype, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32.

        Args:
          tokens: token ids; T is at most `config.max_length`.
          segment_ids: documents packed in a row, as runs of equal ids; a token sees only those with its own, and 0 is
            padding. None: one document a row.
          positions: for the rotary embedding. None: counted from 0 in every row.

        Raises:
          ValueError: if the tokens are no integers [B, T], or the row is longer than the model's.
        """
        return self.with_reports(tokens, segment_ids, positions)[0]

    def with_reports(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], RouterReport | None]:
        """The logits, and what the routers report, an axis for the layers with experts first (None: there are none)."""
        rule, context = self.rule(), self.context(tokens, segment_ids, positions)
        stream, newest = rule.begin(self.sites, self.embedding(tokens))
        segments = cut(self.plan(), rule.block_size)
        *out, reports = depth_scan(
            rule,
            segments,
            call_sublayer,
            dict(self.sublayers.items()),
            self.sites,
            stream,
            newest,
            context,
            remat=self.config.remat,
        )
        return self.logits(rule.readout(self.sites, *out)), reports_in_order(segments, reports)

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and head."""
        return (self.head or self.embedding).logits(self.final_norm(h))

    def plan(self) -> list[str]:
        """The kind of every sublayer, in order."""
        return plan_of(self.config)

    def rule(self) -> Rule:
        """The depth rule."""
        return rule_of(self.config)

    def context(self, tokens, segment_ids=None, positions=None) -> Context:
        """What every sublayer sees beside its input."""
        expect(INTEGERS, ("B", "T"), {"tokens": tokens})
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"a row of {tokens.shape[1]} tokens is longer than model.max_length={self.config.max_length}"
            )
        config = self.config
        rotary_dim = head_dim(config) if "gqa" in attention_kinds(config) else config.mla.rope_dim
        return make_context(tokens, segment_ids, positions, rotary_dim, config.rope_theta, rope_scaling(config))


class Trace(NamedTuple):
    """A forward pass with everything kept; L sublayers."""

    logits: Float[Array, "B T V"]
    inputs: Float[Array, "L+1 B T D"]
    """What each sublayer read, then what the output head read."""
    outputs: Float[Array, "L B T D"]
    """What each sublayer returned."""
    states: Float[Array, "L B T D"]
    """After each sublayer: the residual stream, or the partial sum of the block (`full`: the output itself)."""
    weights: tuple[Float[Array, "sources B T"], ...] | None
    """Of each site over its sources, for `block` the embedding, the completed blocks and the partial sum if there is
    one; None for a rule that keeps everything in a stream."""
    matrix: tuple[Float[Array, "sources B T"], ...]
    """What each site effectively reads of the embedding and of every earlier output, under any rule."""


def unrolled(
    model: Decoder,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    *,
    probes: Float[Array, "L B T D"] | None = None,
) -> Trace:
    """The model as a plain loop over sublayers, everything kept: the reference, and what analysis looks at.

    `probes` are added to the sublayers' outputs: a gradient with respect to zero probes is that of the outputs.
    """
    context, plan = model.context(tokens, segment_ids, positions), model.plan()

    def sublayer(index: int, kind: str, slot: int) -> Callable:
        own = jax.tree.map(lambda stack: stack[slot], model.sublayers[kind])
        return lambda h: (
            call_sublayer(kind, own, h, context)[0]
            + (0 if probes is None else probes[index].astype(model.config.dtype))
        )

    sublayers = [sublayer(i, kind, slot) for i, (kind, slot) in enumerate(zip(plan, slots_of(plan), strict=True))]
    plain = model.rule().plain(model.sites, model.embedding(tokens), sublayers)
    return Trace(
        model.logits(plain.inputs[-1]),
        jnp.stack(plain.inputs),
        jnp.stack(plain.outputs),
        jnp.stack(plain.states),
        None if plain.weights is None else tuple(plain.weights),
        tuple(plain.matrix),
    )


def plan_of(config: ModelConfig) -> list[str]:
    """The kind of every sublayer, in order."""
    pairs = zip(attention_kinds(config), mlp_kinds(config), strict=True)
    return [kind for pair in pairs for kind in pair]


def rule_of(config: ModelConfig) -> Rule:
    """The depth rule."""
    return make_rule(config.depth.rule, config.depth.block_size, config.norm_eps, config.depth)


def rope_scaling(config: ModelConfig) -> RopeScaling | None:
    """The change of rotary frequencies, if there is one."""
    scaling = config.rope_scaling
    if scaling.kind == "llama3":
        return Llama3Scaling(
            scaling.factor, scaling.low_frequency_factor, scaling.high_frequency_factor, scaling.original_length
        )
    if scaling.kind == "yarn":
        return YarnScaling(
            scaling.factor,
            scaling.original_length,
            scaling.beta_fast,
            scaling.beta_slow,
            scaling.mscale or None,
            scaling.mscale_all_dim or None,
        )
    return None


def _gqa(config: ModelConfig, rngs: nnx.Rngs) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        config.width,
        config.num_heads,
        config.num_kv_heads,
        head_dim(config),
        qk_norm=config.qk_norm,
        eps=config.norm_eps,
        dtype=config.dtype,
        implementation=config.attention,
        rngs=rngs,
    )


def _mla(config: ModelConfig, rngs: nnx.Rngs) -> MLA:
    mla, scaling = config.mla, rope_scaling(config)
    return MLA(
        config.width,
        config.num_heads,
        latent_dim=mla.latent_dim,
        nope_dim=mla.nope_dim,
        rope_dim=mla.rope_dim,
        value_dim=mla.value_dim,
        query_rank=mla.query_rank or None,
        rotary=mla.rotary,
        rotary_interleaved=mla.rotary_interleaved,
        output_gate=mla.output_gate,
        eps=config.norm_eps,
        latent_eps=mla.latent_eps,
        scale_multiplier=scaling.softmax_multiplier if mla.rotary and isinstance(scaling, YarnScaling) else 1.0,
        dtype=config.dtype,
        implementation=config.attention,
        rngs=rngs,
    )


def _kda(config: ModelConfig, rngs: nnx.Rngs) -> KDA:
    kda = config.kda
    return KDA(
        config.width,
        kda_heads(config),
        kda.head_dim,
        conv_size=kda.conv_size,
        gate_lower_bound=kda.gate_lower_bound or None,
        full_rank_gate=kda.full_rank_gate,
        eps=config.norm_eps,
        dtype=config.dtype,
        rngs=rngs,
    )


def _swiglu(config: ModelConfig, rngs: nnx.Rngs) -> SwiGLU:
    return SwiGLU(
        config.width,
        config.mlp_width,
        eps=config.norm_eps,
        dtype=config.dtype,
        activation=config.activation,
        rngs=rngs,
    )


def _moe(config: ModelConfig, rngs: nnx.Rngs) -> MoE:
    moe = config.moe
    return MoE(
        config.width,
        moe.num_experts,
        moe.experts_per_token,
        moe.expert_width,
        num_shared=moe.num_shared,
        shared_width=moe.shared_width or None,
        router_activation=moe.router_activation,
        renormalise=moe.renormalise,
        scaling=moe.scaling,
        num_groups=moe.num_groups,
        top_groups=moe.top_groups,
        correction_bias=moe.correction_bias,
        biased_weights=moe.biased_weights,
        latent_width=moe.latent_width or None,
        latent_norm=moe.latent_norm,
        activation=config.activation,
        eps=config.norm_eps,
        dtype=config.dtype,
        implementation=config.experts,
        exchange=config.expert_exchange,
        capacity=config.expert_capacity,
        rngs=rngs,
    )


MAKERS: dict[str, Callable] = {"gqa": _gqa, "mla": _mla, "kda": _kda, "swiglu": _swiglu, "moe": _moe}

REPORTING = ("moe",)
"""Kinds of sublayers that return a report beside their output."""


def call_sublayer(kind: str, sublayer: Callable, h: Array, context: Context) -> tuple[Array, Any]:
    """A sublayer's output and its report, () from one that gives none."""
    return sublayer(h, context) if kind in REPORTING else (sublayer(h, context), ())


def reports_in_order(segments: Sequence[Segment], reports: Sequence[tuple[Any, ...]]) -> RouterReport | None:
    """The reports of all sublayers that give one, in layer order along a leading axis."""
    slots, given = [], []
    for segment, of_segment in zip(segments, reports, strict=True):
        for kind, own, report in zip(segment.kinds, segment.slots.T, of_segment, strict=True):
            if kind in REPORTING:
                slots.append(own)
                given.append(report)
    if not given:
        return None
    order = np.argsort(np.concatenate(slots))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *given)


def _stack(make: Callable, config: ModelConfig, count: int, rngs: nnx.Rngs):
    """`count` sublayers drawn independently, as one module whose leaves have a leading layer axis."""
    return jax.vmap(lambda key: make(config, nnx.Rngs(key)))(jax.random.split(rngs.params(), count))
