"""What the append-only scan promises: memory linear in depth, and one compiled body."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnres_jax.config import Config, DepthConfig, ModelConfig
from attnres_jax.models import Decoder
from attnres_jax.training import TrainState, learning_rate_schedule, make_optimizer, make_train_step


def lower_step(rule, blocks, remat="none"):
    """The project's training step, traced for a model of `blocks` blocks.

    As in a real run, there are more tokens than parameters in a layer, and the width is much larger than the depth: a
    bank also holds one logit for each token, source and site, which is L / D of its sources.
    """
    model_config = ModelConfig(
        vocab_size=32,
        width=512,
        num_layers=blocks,
        num_heads=8,
        num_kv_heads=8,
        mlp_width=512,
        max_length=64,
        remat=remat,
        depth=DepthConfig(rule=rule, block_size=2),
    )
    config = dataclasses.replace(Config(), model=model_config)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule)

    def new_state():
        model = Decoder(model_config, rngs=nnx.Rngs(0))
        return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), jax.random.key(0))

    integers = jax.ShapeDtypeStruct((128, 64), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), integers)
    batch["weights"] = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    step = make_train_step(config.training, optimizer, schedule)
    return step.lower(jax.eval_shape(new_state), batch, jax.ShapeDtypeStruct((32,), jnp.int32))


@pytest.mark.parametrize("rule", ["block", "full"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_grows_linearly_with_the_number_of_blocks(rule, remat):
    """Temporary bytes at N=4, 8, 16 with one layer a block: the second difference is below 5 %."""
    small, middle, large = (
        lower_step(rule, blocks, remat).compile().memory_analysis().temp_size_in_bytes for blocks in (4, 8, 16)
    )
    assert middle > small
    assert abs((large - middle) / 2 - (middle - small)) < 0.05 * (middle - small)


def test_compile_time_does_not_grow_with_the_number_of_blocks():
    """At most 15 % from N=4 to N=16: in instructions, and in seconds of processor time (the best of a few)."""
    seconds, instructions = {4: [], 16: []}, {}
    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for _ in range(8):  # a busy machine slows single compilations down: more tries until the best ones agree
            for blocks in seconds:
                lowered = lower_step("block", blocks)
                started = time.process_time()
                compiled = lowered.compile()
                seconds[blocks].append(time.process_time() - started)
                instructions[blocks] = compiled.as_text().count(" = ")
            if min(seconds[16]) <= 1.15 * min(seconds[4]):
                break
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    assert instructions[16] <= 1.02 * instructions[4]
    assert min(seconds[16]) <= 1.15 * min(seconds[4])
