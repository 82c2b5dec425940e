"""A run that starts from a model which is there already: its tokenizer, parameters, and loss before the first step."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from small_runs import ROOT, small_overrides
from training_runs import history

from attnres_jax import ModelConfig, build_model
from attnres_jax.config import DepthConfig, load_config
from attnres_jax.data import heldout_batches, train_tokenizer
from attnres_jax.errors import ConfigError
from attnres_jax.evaluation import evaluate
from attnres_jax.interop import InteropError, load_pretrained, load_tokenizer, save_pretrained
from attnres_jax.training import export_run, restore_model, restore_text, train
from attnres_jax.training.records import read_rows

TINY = ModelConfig(
    vocab_size=320,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=32,
    max_length=64,
    depth=DepthConfig(rule="residual"),
)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    changes = {
        "training.steps": 6,
        "training.eval_every": 3,
        "training.checkpoint_every": 3,
        "optimizer.warmup_steps": 1,
        "optimizer.learning_rate": 1e-2,
    }
    # The model is the directory's, but for the dtype of activations, in which one and the other rule round differently.
    return ["model.dtype=float32"] + [
        item for item in small_overrides(tmp_path_factory, changes) if not item.startswith("model.")
    ]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A residual model in bfloat16 with a tokenizer of its own, of fewer tokens than its vocabulary has rows."""
    directory = tmp_path_factory.mktemp("models") / "released"
    model = build_model(TINY, rngs=nnx.Rngs(7))
    model.embedding.table[...] *= 3.0  # so that tokens are told from each other
    save_pretrained(model, directory, dtype="bfloat16")
    train_tokenizer(["a line says that a document has a line"] * 3, 280).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"eos_token_id": 0, "note": "of its makers"}))
    return directory


@pytest.fixture(scope="module")
def config(released, overrides):
    return load_config(f"{ROOT}/configs/finetune.py:model={released},residual=block", overrides)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(config, workdir)
    return workdir


def heldout_loss(model, workdir, config):
    text = restore_text(workdir)
    return evaluate(model, heldout_batches(text, config.data, config.training.eval_sequences), text.token_bytes).loss


def test_the_loss_of_step_0_is_that_of_the_model_and_training_lowers_it(finished, released, config):
    losses = [row["loss"] for row in read_rows(finished / "metrics.jsonl") if row["kind"] == "eval"]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.1
    before = heldout_loss(load_pretrained(released, dtype="float32", param_dtype="float32"), finished, config)
    assert losses[0] == pytest.approx(before, rel=1e-5)
    _, model, _ = restore_model(finished)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(model))
    assert model.config.depth.rule == "block" and np.abs(model.sites.query[1:]).max() > 0


def test_the_text_is_in_the_models_own_tokens(finished, released):
    text, tokenizer = restore_text(finished), load_tokenizer(released)
    document = text.train[0].tolist()
    assert document[0] == document[-1] == 0 and max(document) < tokenizer.size == 280
    words = tokenizer.decode(document[1:-1])
    assert words.startswith("document ") and tokenizer.encode(words) == document[1:-1]
    assert text.token_bytes[document].sum() == len(words.encode())


def test_a_run_goes_on_without_the_directory_and_goes_out_again(finished, released, config, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(released, moved)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer=str(moved)),
        training=dataclasses.replace(config.training, init_from=str(moved)),
    )
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(moved)
    train(config, workdir)
    assert history(workdir) == history(finished)
    shutil.copytree(released, moved)
    export_run(workdir, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["note"], values["eos_token_id"], values["attn_res_block_size"]) == ("of its makers", 0, 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (released / name).read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 0}
    last = read_rows(workdir / "metrics.jsonl")[-1]["loss"]
    assert heldout_loss(load_pretrained(tmp_path / "out"), workdir, config) == pytest.approx(last, rel=1e-6)


def test_an_attnres_model_keeps_its_blocks_and_another_tokenizer_is_another_text(finished, overrides, tmp_path):
    export_run(finished, tmp_path / "out")
    spec = f"{ROOT}/configs/finetune.py:model={tmp_path / 'out'}"
    config = load_config(spec, overrides)
    assert (config.model.depth.rule, config.model.depth.block_size, config.model.depth.sum_sources) == (
        "block",
        2,
        True,
    )
    fresh = load_config(str(ROOT / "configs/tiny.py"), [*overrides, "model.vocab_size=320", "training.steps=2"])
    train(dataclasses.replace(fresh, model=config.model), tmp_path / "fresh")
    assert restore_text(tmp_path / "fresh").fingerprint != restore_text(finished).fingerprint
    assert load_tokenizer(tmp_path / "fresh").end_id == 0
    train(config, tmp_path / "further")
    first = [read_rows(run / "metrics.jsonl") for run in (tmp_path / "further", finished)]
    assert first[0][0]["loss"] == pytest.approx(first[1][-1]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            ["data.tokenizer="],
            ConfigError,
            "does not know the tokens of a tokenizer trained on the text; nearest: data",
        ),
        (["model.num_layers=3"], ConfigError, "model.num_layers=3 is 2 in training.init_from="),
        (["model.depth.rule=delta", "model.depth.sum_sources=false"], None, None),
        (["training.init_from=nowhere"], InteropError, "'nowhere' is neither a directory nor a repository id"),
        (["data.tokenizer=nowhere"], InteropError, "'nowhere' is neither a directory nor a repository id"),
        (["data.tokenizer={fixture}"], InteropError, "llama has neither tokenizer.json nor tiktoken.model"),
        (
            ["model.vocab_size=279", "training.init_from="],
            ValueError,
            "model.vocab_size=279 has no room for the ids of data.tokenizer=",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(changes, error, message, released, overrides, tmp_path):
    changes = [change.format(fixture=ROOT / "tests" / "fixtures" / "llama") for change in changes]
    spec = f"{ROOT}/configs/finetune.py:model={released},residual=block"
    if error is None:  # any rule may be put on a residual model
        train(load_config(spec, [*overrides, *changes, "training.steps=2"]), tmp_path / "run")
        return
    with pytest.raises(error) as caught:
        train(load_config(spec, [*overrides, *changes]), tmp_path / "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_model_with_blocks_is_not_put_under_another_rule(finished, overrides, tmp_path):
    export_run(finished, tmp_path / "out")
    spec = f"{ROOT}/configs/finetune.py:model={tmp_path / 'out'}"
    with pytest.raises(InteropError, match="has depth weights of its own"):
        load_config(f"{spec},residual=full", overrides)
    with pytest.raises(InteropError, match="has depth weights of its own"):
        train(load_config(spec, [*overrides, "model.depth.block_size=4"]), tmp_path / "run")
    with pytest.raises(ConfigError, match="which model"):
        load_config(f"{ROOT}/configs/finetune.py")
