import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]


def start(workdir, overrides):
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [
        sys.executable,
        ROOT / "demo.py",
        f"--workdir={workdir}",
        *(f"--config.{change}" for change in overrides),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | cache, **pipes)


def test_demo_stops_resumes_compares_and_says_what_is_done(small, tmp_path):
    workdir, metrics = tmp_path / "demo", tmp_path / "demo" / "residual" / "metrics.jsonl"
    overrides = [*small, "training.steps=400", "training.eval_every=200", "training.checkpoint_every=1000"]

    demo = start(workdir, overrides)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and demo.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    demo.send_signal(signal.SIGTERM)
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert (
        errors.splitlines()[-1].partition(": ")[2].startswith("residual was interrupted and saved; go on with: python")
    )
    assert json.loads((workdir / "residual" / "summary.json").read_text())["status"] == "interrupted"
    assert not (workdir / "block").exists()

    demo = start(workdir, overrides)
    printed, errors = demo.communicate(timeout=300)
    assert demo.returncode == 0, errors
    said = [line for line in printed.splitlines() if line.startswith("[")]
    assert [line.split(" in ")[0] for line in said] == [
        "[1/3] residual: resuming",
        "[2/3] block: training",
        "[3/3] full: training",
    ]
    assert "tiny_full is " in printed and f"report: {workdir}/report.html" in printed
    assert (workdir / "report.html").read_text().count("<img ") == 12

    demo = start(workdir, overrides)
    again, errors = demo.communicate(timeout=120)
    assert demo.returncode == 0 and errors == ""
    assert [line.split(", ")[0] for line in again.splitlines()[:3]] == [
        "[1/3] residual: done",
        "[2/3] block: done",
        "[3/3] full: done",
    ]
    assert printed.endswith(again.partition("\n\n")[2])  # the same table and judgements


def test_demo_stops_at_an_arm_that_fails(small, tmp_path):
    demo = start(tmp_path / "demo", [*small, "data.files=/nowhere/*.txt"])
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "residual did not finish (exit code 2, its reason stands above)" in errors.splitlines()[-1]
    assert "Traceback" not in errors, errors
