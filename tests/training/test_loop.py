"""Whole runs in this process: their records, resuming, finishing, and stopping at what is not finite."""

import dataclasses
import json
import shutil

import jax
import pytest
from flax import nnx
from training_runs import SETTINGS, history

from attnres_jax.config import read_config
from attnres_jax.data import load_text, train_iterator
from attnres_jax.evaluation.perplexity import evaluate
from attnres_jax.models import Decoder
from attnres_jax.training import ChangedTextError, NonFiniteError, train
from attnres_jax.training.records import read_rows, read_summary


def test_a_run_leaves_its_records(finished_run, config):
    rows = read_rows(finished_run / "metrics.jsonl")
    training = [row for row in rows if row["kind"] == "train"]
    heldout = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in training] == list(range(1, 41))
    assert [row["step"] for row in heldout] == [10, 20, 30, 40]
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert heldout[-1]["loss"] < heldout[0]["loss"]
    assert training[-1]["tokens"] == heldout[-1]["tokens"] == 40 * 4 * 32
    groups = ("embedding", "attention", "mlp", "norms", "depth_queries", "depth_key_scales")
    for key in ["bits_per_byte", "learning_rate", "grad_norm", "flops", "tokens_per_second", "step_seconds"]:
        assert key in training[0]
    for group in groups:
        assert {f"{kind}_norm/{group}" for kind in ("param", "grad", "update")} <= set(training[0])
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    summary = read_summary(finished_run)
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("finished", 40, 5120)
    assert summary["final_loss"] == heldout[-1]["loss"]
    assert summary["compile_seconds"] > 0
    assert summary["peak_memory_bytes"] > 3 * 4 * summary["parameters"]
    assert training[-1]["flops"] == summary["flops_per_token"] * 5120
    assert read_config(finished_run / "config.json") == config
    assert list((finished_run / "tensorboard").iterdir())


def test_the_seed_draws_the_parameters_and_the_order_of_the_text(finished_run, config):
    """The first loss is that of the first batch, by the model as both are drawn from the seed."""
    seed, text = SETTINGS["seed"], load_text(config.data, config.model.vocab_size)
    first = read_rows(finished_run / "metrics.jsonl")[0]["loss"]
    for seeds, same in (((seed, seed), True), ((0, seed), False), ((seed, 0), False)):
        model = jax.jit(lambda key: Decoder(config.model, rngs=nnx.Rngs(key)))(jax.random.key(seeds[0]))
        batch = next(train_iterator(text, config.data, seed=seeds[1]))
        loss = evaluate(model, [batch], text.token_bytes).loss
        assert (abs(loss - first) < 1e-5) == same, seeds


def test_a_stopped_run_goes_on_bitwise(stopped_run, finished_run, config):
    before = read_rows(stopped_run / "metrics.jsonl")
    summary = train(config, stopped_run)
    assert history(stopped_run) == history(finished_run)
    after = read_rows(stopped_run / "metrics.jsonl")
    kept = [row for row in before if row["step"] <= 12]
    assert after[: len(kept)] == kept
    assert after[len(kept)]["seconds"] > kept[-1]["seconds"]
    assert summary["final_loss"] == read_summary(finished_run)["final_loss"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(stopped_run, finished_run, config):
    shutil.rmtree(stopped_run / "checkpoints")
    train(config, stopped_run)
    assert history(stopped_run) == history(finished_run)


def test_a_finished_run_is_left_alone(finished_run, config, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.name != "lock"}
    assert train(config, finished_run) == read_summary(finished_run)
    assert "is finished: 40 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.name != "lock"} == before


def test_a_run_killed_before_its_summary_gets_it_without_training(finished_run, tmp_path, config):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    (workdir / "summary.json").unlink()
    summary = train(config, workdir)
    dated = {"date"}
    assert {k: v for k, v in summary.items() if k not in dated} == {
        k: v for k, v in read_summary(finished_run).items() if k not in dated
    }
    assert read_rows(workdir / "metrics.jsonl") == read_rows(finished_run / "metrics.jsonl")


def test_what_is_not_finite_stops_the_run_before_it_is_saved(poisoned_run, config):
    """Step 16 is not finite, and a save is due at it."""
    with pytest.raises(NonFiniteError) as caught:
        train(config, poisoned_run)
    message = str(caught.value)
    assert "step 16 is not finite" in message
    assert "the checkpoint of step 15 is kept" in message
    assert "\n" not in message
    assert caught.value.exit_code == 1
    assert max(int(path.name) for path in (poisoned_run / "checkpoints").iterdir()) == 15
    assert all(row["step"] < 16 for row in read_rows(poisoned_run / "metrics.jsonl"))
    for line in (poisoned_run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_run_does_not_go_on_with_another_text(stopped_run, config, tmp_path):
    """Files are part of the config, what is in them is not."""
    changed = dataclasses.replace(config.data, files=str(tmp_path / "text" / "*.txt"))
    source = config.data.files.removesuffix("/*.txt")
    shutil.copytree(source, tmp_path / "text")
    (tmp_path / "text" / "3.txt").write_text("something else altogether\n" * 50)
    changed = dataclasses.replace(config, data=changed)
    (stopped_run / "config.json").write_text(json.dumps(dataclasses.asdict(changed)))
    with pytest.raises(ChangedTextError, match="has changed since step 12"):
        train(changed, stopped_run)
