"""What the compiler makes of the block rule's training step: no copy of the bank, in no form, for no site.

Buffers are recognised by their shapes in the program text. A rule that does stack its sources again at every site is
read in the same way, to show that the reader would see it.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tpu_compiler import needs_libtpu, run_python

from attnres_jax.config import Config, DepthConfig, ModelConfig
from attnres_jax.depth import Options, Segment, depth_attention, depth_scan, inter_block, make_rule, normalise
from attnres_jax.depth.bank import WholeBank
from attnres_jax.depth.block import Block
from attnres_jax.models import Decoder
from attnres_jax.training import TrainState, learning_rate_schedule, make_optimizer, make_train_step

BATCH, TOKENS, WIDTH, BLOCKS, SUBLAYERS = 3, 24, 56, 5, 4  # no other array has the first three
SLOTS = BLOCKS  # the embedding and all blocks but the last, which is a short one: what blocks save is not as many
# The tests' quick settings would leave out part of what is to be read here.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


class Restacked(WholeBank, Block):
    """Block AttnRes as one would first write it: every site puts the partial sum behind the sources and reads them."""

    def block(self, sites, stream, view, place, sublayers):
        """Every site by itself."""
        partial = None
        for i, sublayer in enumerate(sublayers):
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, view, index=place.num_valid, axis=0)
            sources = view if partial is None else put(partial)
            query, key_scale = sites.query[place.site + i], sites.key_scale[place.site + i]
            state = inter_block(sources, query[None], key_scale[None], place.num_valid + min(i, 1), eps=self.eps)
            y = sublayer(normalise(state.site(0)).astype(view.dtype))
            partial = y if partial is None else partial + y
        return None, (), partial

    def readout(self, sites, stream, newest, bank):
        """The last site."""
        sources = jnp.concatenate([bank, newest[None]])
        return depth_attention(sources, sites.query[-1], sites.key_scale[-1], eps=self.eps)


class RestackedDecoder(Decoder):
    """The model under that rule."""

    def rule(self):
        """The depth rule."""
        return Restacked(SUBLAYERS, self.config.norm_eps)


@functools.cache
def lowered_step(
    decoder: type[Decoder],
    dtype: str,
    remat: str,
    rule: str = "block",
    device: jax.Device | None = None,
) -> jax.stages.Lowered:
    """The project's training step, for a device that need not be there."""
    model_config = ModelConfig(
        vocab_size=32,
        width=WIDTH,
        num_layers=BLOCKS * SUBLAYERS // 2 - 1,
        num_heads=7,
        num_kv_heads=7,
        mlp_width=88,
        max_length=TOKENS,
        dtype=dtype,
        remat=remat,
        depth=DepthConfig(rule=rule, block_size=SUBLAYERS),
    )
    config = dataclasses.replace(Config(), model=model_config)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule)

    def new_state():
        model = decoder(model_config, rngs=nnx.Rngs(0))
        return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), jax.random.key(0))

    integers = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), integers)
    batch["weights"] = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.float32)
    step = make_train_step(config.training, optimizer, schedule)
    arguments = (jax.eval_shape(new_state), batch, jax.ShapeDtypeStruct((32,), jnp.int32))
    if device is not None:
        place = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
        arguments = jax.tree.map(lambda x: place(x.shape, x.dtype), arguments)
    return step.lower(*arguments)


@functools.cache
def optimised(decoder: type[Decoder], dtype: str, remat: str) -> str:
    """The step as XLA leaves it."""
    return lowered_step(decoder, dtype, remat).compile(compiler_options=OPTIMISED).as_text()


def activations(text: str) -> Iterator[tuple[str, int]]:
    """Of every array that is made of activations [B, T, D], in any order of axes: its dtype, and how many they are."""
    hlo = re.findall(r"\b(\w+)\[([\d,]+)\]", text)
    stable_hlo = [(dtype, dims) for dims, dtype in re.findall(r"tensor<((?:\d+x)+)(\w+)>", text)]
    for dtype, dims in {*hlo, *stable_hlo}:
        sizes = [int(size) for size in re.findall(r"\d+", dims)]
        if {BATCH, TOKENS, WIDTH} <= set(sizes):
            yield dtype, int(np.prod(sizes)) // (BATCH * TOKENS * WIDTH)


def loop_bodies(text: str) -> str:
    """The instructions of all loop bodies, and of what they call."""
    computations = dict(re.findall(r"^(?:ENTRY )?(%?[\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    pending, seen = re.findall(r"\bwhile\(.*?body=(%?[\w.-]+)", text), set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [called for called in re.findall(r"%[\w.-]+", computations[name]) if called in computations]
    return "".join(computations[name] for name in sorted(seen))


def copies(text: str) -> int:
    """Instructions that copy a whole bank, in loops."""
    instructions = re.findall(r"= (\S+) copy(?:-start)?\(", loop_bodies(text))
    return sum(count >= SLOTS for shape in instructions for _, count in activations(shape))


def stacked(text: str) -> int:
    """Instructions that put several activations together."""
    shapes = re.findall(r"= (\S+) concatenate\(", text)
    return sum(count > 1 for shape in shapes for _, count in activations(shape))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_array_holds_more_than_one_bank(remat):
    """A copy of the sources a site, a block or a sublayer would be [S, N+1, B, T, D] or the like."""
    assert max(count for _, count in activations(optimised(Decoder, "float32", remat))) == SLOTS


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_loop_copies_the_bank_and_no_site_stacks_sources(remat):
    text = optimised(Decoder, "float32", remat)
    assert copies(text) == stacked(text) == 0


def test_sources_stacked_at_every_site_would_be_seen():
    text = optimised(RestackedDecoder, "float32", "none")
    assert max(count for _, count in activations(text)) >= (BLOCKS - 1) * SLOTS  # kept for every block
    assert copies(text) > 0 and stacked(text) > 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_bfloat16_bank_is_never_float32(remat):
    """Read before optimisation: XLA on CPU computes bfloat16 in float32, and converts whole arrays by itself."""
    found = set(activations(lowered_step(Decoder, "bfloat16", remat).as_text()))
    assert ("bf16", SLOTS) in found
    assert ("f32", SLOTS) not in found


TPU = f"""
import sys
sys.path[:0] = {sys.path!r}
from attnres_jax.parallel.chips import slice_devices
from test_hlo import Decoder, activations, lowered_step
(device, *_), _ = slice_devices("v5p:2x2x1")
for rule in ("block", "rms_block", "full"):
    found = set(activations(lowered_step(Decoder, "bfloat16", "full", rule, device).compile().as_text()))
    print(*[max(count for dtype, count in found if dtype == own) for own in ("bf16", "f32")])
"""


@pytest.mark.slow
@needs_libtpu
def test_a_bfloat16_bank_is_never_float32_on_a_tpu():
    """As the TPU's compiler leaves it: no float32 array is of more than one source."""
    run = run_python("-c", TPU)
    assert run.returncode == 0
    found = np.array(run.stdout.split(), int).reshape(3, 2)
    assert (found[:, 0] >= SLOTS).all() and (found[:, 1] == 1).all()


def test_a_float32_bank_would_be_seen():
    assert ("f32", SLOTS) in set(activations(lowered_step(RestackedDecoder, "bfloat16", "full").as_text()))


@pytest.mark.parametrize("rule", ["residual", "block"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_block_is_computed_again_even_if_it_is_the_only_one_of_its_kind(rule, blocks):
    """XLA takes a loop of one turn apart, where it could merge the recomputation with the forward pass."""
    rule = make_rule(rule, 2, 1e-6, Options())
    segment = Segment(("mlp", "mlp"), np.arange(2 * blocks).reshape(blocks, 2))
    sublayer = lambda kind, own, h, context: (jnp.tanh(jnp.tanh(h @ own) @ own), ())  # noqa: E731
    stacks, sites = {"mlp": jnp.ones((2 * blocks, WIDTH, WIDTH))}, rule.init_sites(2 * blocks, WIDTH)

    def products(remat: str) -> int:
        def loss(stacks, x):
            stream, newest = rule.begin(sites, x)
            *out, _ = depth_scan(rule, (segment,), sublayer, stacks, sites, stream, newest, remat=remat)
            return jnp.sum(jnp.square(rule.readout(sites, *out)))

        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(stacks, jnp.ones((BATCH, TOKENS, WIDTH)))
        return lowered.compile(compiler_options=OPTIMISED).as_text().count(" dot(")

    assert products("full") >= products("none") + 2
