"""The commands as a user types them: one line for what is wrong, and a trained run that goes out and comes back."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from checkpoints import FIXTURES
from small_runs import ROOT, small_overrides

from attnres_jax.config import load_config
from attnres_jax.training import train

SETTINGS = {"training.steps": 6, "optimizer.warmup_steps": 2, "training.eval_every": 6, "training.checkpoint_every": 6}


def run(*arguments, code=0, script=("-m", "attnres_jax.interop")):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    command = [sys.executable, *script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code != 2 else done.stderr


def test_inspect_convert_and_verify(tmp_path):
    out = run("inspect", FIXTURES / "llama")
    assert "llama, 29,408 parameters" in out and "30 in 1 files, all accounted for; 29,408 F32" in out
    assert re.search(r"sublayers.gqa.query.kernel +3 x 32 x 32 +model.layers.0.self_attn.q_proj.weight", out)
    run("convert", FIXTURES / "llama", tmp_path / "out", "--residual=block", "--layers_per_block=2")
    assert "depth rule: block, 2 layers a block" in run("inspect", tmp_path / "out")
    out = run("verify", FIXTURES / "llama", tmp_path / "out", "--tokens=40")
    assert "the same function" in out and "40 random tokens" in out and out.count("e-0") >= 2
    out = run("verify", FIXTURES / "qwen3", FIXTURES / "llama", code=1)
    assert "NOT the same function" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "command '' is unknown; known: inspect, convert, verify, export"),
        (("inspect",), "inspect takes 1 argument, not 0"),
        (("inspect", "nowhere", "--config.x=1"), "--config.x=1: no command takes --config"),
        (("inspect", "nowhere"), "'nowhere' is neither a directory nor a repository id"),
        (("convert", FIXTURES / "llama", FIXTURES), "is not an empty directory"),
        (("verify", FIXTURES / "llama", FIXTURES / "llama", "--text=nowhere"), "--text=nowhere cannot be read"),
        (("verify", FIXTURES / "llama", FIXTURES / "llama", "--tokens=0"), "--tokens=0"),
        (("verify", FIXTURES / "llama", FIXTURES / "kimi_linear"), "they are not one model under two rules"),
        (("convert", FIXTURES / "llama", "out", "--layers_per_block=-1"), "--layers_per_block=-1"),
        (
            ("convert", FIXTURES / "llama", "out", "--residual=full"),
            "residual='full': a checkpoint counts the layers of a block (attn_res_block_size), so it can be",
        ),
        (
            ("verify", FIXTURES / "llama", FIXTURES / "llama", "--text=README.md"),
            "llama has neither tokenizer.json nor tiktoken.model; without --text, random tokens are compared",
        ),
        (("export", "nowhere", "out"), "is not the workdir of a run"),
    ],
)
def test_one_line_and_exit_code_2(arguments, message):
    error = run(*arguments, code=2).strip().splitlines()[-1]
    assert message in error


@pytest.mark.parametrize("rule", ["block", "residual"])
def test_a_trained_run_goes_out_and_comes_back_with_the_same_loss(rule, tmp_path, tmp_path_factory):
    config = load_config(f"{ROOT / 'configs/tiny.py'}:residual={rule}", small_overrides(tmp_path_factory, SETTINGS))
    train(config, tmp_path / "run")
    error = run("inspect", tmp_path / "run", code=2)
    assert f"{tmp_path}/run is a run of train.py; export it first: python -m attnres_jax.interop export" in error
    run("export", tmp_path / "run", tmp_path / "out")
    trained = run(f"--workdir={tmp_path / 'run'}", script=("eval.py",)).partition(": ")[2]
    exported = run(f"--workdir={tmp_path / 'run'}", f"--pretrained={tmp_path / 'out'}", script=("eval.py",))
    assert exported.partition(": ")[2] == trained and "held-out loss" in trained
    text = Path(config.data.files).parent / "0.txt"
    out = run("verify", tmp_path / "out", tmp_path / "out", f"--text={text}")
    assert "none: the two are bitwise equal" in out
    tokenizer, kept = tmp_path / "out" / "tokenizer.json", (tmp_path / "out" / "tokenizer.json").read_text()
    values = json.loads(kept)
    values["model"]["merges"] = values["model"]["merges"][::-1]
    tokenizer.write_text(json.dumps(values))
    error = run(f"--workdir={tmp_path / 'run'}", f"--pretrained={tmp_path / 'out'}", script=("eval.py",), code=2)
    assert f"does not read the tokens of {tmp_path / 'run'}" in error
    tokenizer.write_text(kept)
    # The run has its tokenizer itself; on a changed text there is no comparison.
    text.write_text("something else entirely")
    run("export", tmp_path / "run", tmp_path / "again")
    same = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]
    error = run(f"--workdir={tmp_path / 'run'}", f"--pretrained={tmp_path / 'out'}", script=("eval.py",), code=2)
    assert "has changed since step 6" in error
