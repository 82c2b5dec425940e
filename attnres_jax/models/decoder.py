"""The decoder: embedding, a stack of sublayers under a depth rule, final norm, head."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.config import ModelConfig
from attnres_jax.depth import depth_scan, make_rule
from attnres_jax.layers import Context, Embedding, GroupedQueryAttention, RMSNorm, SwiGLU, make_context
from attnres_jax.layers.rotary import Llama3Scaling
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
          segment_ids: documents packed in a row; a token sees only those with its own id. None: one document a row.
          positions: for the rotary embedding. None: counted from 0 in every row.

        Raises:
          ValueError: if the row is longer than the model's.
        """
        rule, context = self.rule(), self.context(tokens, segment_ids, positions)
        begin = lambda sites, embedding: rule.begin(sites, embedding(tokens))  # noqa: E731
        if self.config.remat == "full":  # the bank holds the embeddings already: looked up again, not kept twice
            begin = jax.checkpoint(begin)
        stream, bank = begin(self.sites, self.embedding)
        stream, bank, _ = depth_scan(
            rule,
            cut(self.plan(), rule.block_size),
            lambda kind, sublayer, h, context: (sublayer(h, context), ()),
            dict(self.sublayers.items()),
            self.sites,
            stream,
            bank,
            context,
            remat=self.config.remat,
        )
        return self.logits(rule.readout(self.sites, stream, bank))

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and head."""
        return (self.head or self.embedding).logits(self.final_norm(h))

    def plan(self) -> list[str]:
        """The kind of every sublayer, in order."""
        return ["gqa", "swiglu"] * self.config.num_layers

    def rule(self):
        """The depth rule."""
        depth = self.config.depth
        return make_rule(depth.rule, depth.block_size, self.config.norm_eps, depth)

    def context(self, tokens, segment_ids=None, positions=None) -> Context:
        """What every sublayer sees beside its input."""
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"a row of {tokens.shape[1]} tokens is longer than model.max_length={self.config.max_length}"
            )
        config = self.config
        scaling = rope_scaling(config)
        return make_context(tokens, segment_ids, positions, head_dim(config), config.rope_theta, scaling)


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
        return lambda h: own(h, context) + (0 if probes is None else probes[index].astype(model.config.dtype))

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


def head_dim(config: ModelConfig) -> int:
    """Width of an attention head."""
    return config.head_dim or config.width // config.num_heads


def rope_scaling(config: ModelConfig) -> Llama3Scaling | None:
    """The change of rotary frequencies, if there is one."""
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return None
    return Llama3Scaling(
        scaling.factor, scaling.low_frequency_factor, scaling.high_frequency_factor, scaling.original_length
    )


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


def _swiglu(config: ModelConfig, rngs: nnx.Rngs) -> SwiGLU:
    return SwiGLU(config.width, config.mlp_width, eps=config.norm_eps, dtype=config.dtype, rngs=rngs)


MAKERS: dict[str, Callable] = {"gqa": _gqa, "swiglu": _swiglu}


def _stack(make: Callable, config: ModelConfig, count: int, rngs: nnx.Rngs):
    """`count` sublayers drawn independently, as one module whose leaves have a leading layer axis."""
    return jax.vmap(lambda key: make(config, nnx.Rngs(key)))(jax.random.split(rngs.params(), count))
