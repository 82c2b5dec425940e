"""Checkpoints: what they hold, which is the newest, and how a missing one is reported."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnres_jax.data import heldout_batches, load_text, train_iterator
from attnres_jax.errors import ConfigError
from attnres_jax.evaluation import evaluate
from attnres_jax.training import CheckpointError, TrainState, restore_model, train
from attnres_jax.training.checkpoints import Checkpoints
from attnres_jax.training.records import read_summary


@pytest.fixture
def batches(config):
    return train_iterator(load_text(config.data, config.model.vocab_size), config.data, seed=0)


def state_of(value, step=0, size=1 << 18):
    model = {"kernel": jnp.full(size, value), "scale": jnp.full(3, value)}
    opt_state = optax.adam(0.1).init(model)
    return TrainState(jnp.asarray(step, jnp.int32), model, opt_state, jax.random.key(7))


def shapes_of(state):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state)


def test_everything_comes_back(tmp_path, batches):
    state = state_of(3.0, step=5)
    for _ in range(5):
        next(batches)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(5, state, batches, {"seconds": 1.5})
        following = [next(batches) for _ in range(3)]
        assert checkpoints.latest() == 5
        assert checkpoints.record(5) == {"seconds": 1.5}
        restored = checkpoints.restore(5, shapes_of(state), batches)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.rng.dtype == state.rng.dtype
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        got, want = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (got, want))
        np.testing.assert_array_equal(got, want)
    for batch in following:
        jax.tree.map(np.testing.assert_array_equal, next(batches), batch)


def test_steps_that_follow_do_not_reach_into_a_save_under_way(tmp_path, batches):
    """The next step is given the very buffers that are being written."""
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    model = {"kernel": jnp.zeros(1 << 21)}
    state = TrainState(jnp.zeros((), jnp.int32), model, (), jax.random.key(0))
    with Checkpoints(tmp_path / "c", keep=9) as checkpoints:
        for step in range(1, 4):
            model = advance(model)
            state = TrainState(jnp.asarray(step, jnp.int32), model, (), jax.random.key(0))
            checkpoints.save(step, state, batches, {})
            for _ in range(10):
                model = advance(model)
        checkpoints.latest()
        for step in range(1, 4):
            saved = checkpoints.restore(step, shapes_of(state), batches).model["kernel"]
            np.testing.assert_array_equal(saved, np.full(1 << 21, 11 * (step - 1) + 1, np.float32))


def test_only_the_newest_are_kept_and_leftovers_are_removed(tmp_path, batches):
    folder = tmp_path / "c"
    leftover = folder / "9.orbax-checkpoint-tmp" / "model.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step, size=4), batches, {})
        assert checkpoints.latest() == 3
        assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_an_old_checkpoint_that_was_being_deleted_does_no_harm(tmp_path, batches):
    folder = tmp_path / "c"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step, size=4), batches, {})
    shutil.rmtree(folder / "1" / "model")
    (folder / "1" / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 2
        checkpoints.save(3, state_of(3, size=4), batches, {})
        assert checkpoints.latest() == 3
        assert checkpoints.steps() == [2, 3]


def test_restored_model_is_the_one_that_was_trained(finished_run, config):
    got_config, model, step = restore_model(finished_run)
    assert (got_config, step) == (config, 40)
    text = load_text(config.data, config.model.vocab_size)
    result = evaluate(model, heldout_batches(text, config.data, 8), text.token_bytes)
    assert result.loss == read_summary(finished_run)["final_loss"]
    _, earlier, step = restore_model(finished_run, 8)
    assert step == 8
    assert evaluate(earlier, heldout_batches(text, config.data, 8), text.token_bytes).loss > result.loss


def test_a_damaged_checkpoint_is_one_line_that_names_the_one_before(stopped_run, config):
    files = [path for path in (stopped_run / "checkpoints" / "12" / "model").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    for read in (lambda: restore_model(stopped_run), lambda: train(config, stopped_run)):
        with pytest.raises(
            CheckpointError, match=r"step 12 .* remove .*/checkpoints/12 to go on from step 8$"
        ) as error:
            read()
        assert "\n" not in str(error.value)
    shutil.rmtree(stopped_run / "checkpoints" / "12")
    assert restore_model(stopped_run)[2] == 8


def test_missing_checkpoints_are_one_line(stopped_run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; it has 4, 8, 12"):
        restore_model(stopped_run, 5)
    shutil.rmtree(stopped_run / "checkpoints" / "12" / "model")
    with pytest.raises(CheckpointError, match=r"step 12 .* cannot be read"):
        restore_model(stopped_run)
    shutil.rmtree(stopped_run / "checkpoints")
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        restore_model(stopped_run)
    with pytest.raises(ConfigError, match="is not the workdir of a run"):
        restore_model(tmp_path / "nowhere")
