import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnres_jax.analysis import compare, text

ROOT = Path(__file__).parents[2]


def cells(comparison, label):
    return next(row[1:] for row in comparison.rows if row[0] == label)


def test_table_holds_what_the_runs_measured(make_run):
    comparison = compare([make_run("a", loss=3.0), make_run("b", "block", loss=2.9)])
    assert cells(comparison, "held-out loss, final") == ("3.0000", "2.9000")
    assert cells(comparison, "bits/byte, best") == ("1.5000", "1.4500")
    assert cells(comparison, "tokens/s") == ("20,480", "17,067")
    assert cells(comparison, "step time, ms") == ("100.0", "120.0")
    assert cells(comparison, "step time / first") == ("1.000", "1.200")
    assert cells(comparison, "peak memory, MiB") == ("300", "300")
    assert cells(comparison, "compile time, s") == ("4.2", "4.2")
    assert cells(comparison, "tokens trained") == ("81,920", "81,920")
    assert cells(comparison, "parameters") == ("1,234,567", "1,234,567")
    assert cells(comparison, "seeds") == ("0", "0")


def test_best_is_the_lowest_evaluation(make_run):
    workdir = make_run("a", loss=3.0)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 41, "loss": 3.5, "bits_per_byte": 1.7, "tokens": 81920}\n')
    comparison = compare([workdir])
    assert cells(comparison, "held-out loss, final") == ("3.5000",)
    assert cells(comparison, "held-out loss, best") == ("3.0000",)


def test_seeds_are_mean_and_standard_deviation(make_run):
    comparison = compare([make_run("a", seed=0, loss=3.0), make_run("b", seed=1, loss=3.2), make_run("c", "full")])
    assert cells(comparison, "held-out loss, final") == ("3.1000 ± 0.1414", "3.0000")
    assert cells(comparison, "seeds") == ("0, 1 (n = 2)", "0")
    assert cells(comparison, "parameters") == ("1,234,567", "1,234,567")


def test_unknown_numbers_are_dashes_and_divergence_is_named(make_run):
    workdir = make_run("a", loss=float("inf"), peak_memory_bytes=None)
    comparison = compare([workdir, make_run("b", "block")])
    assert cells(comparison, "peak memory, MiB") == ("–", "300")
    assert cells(comparison, "held-out loss, final") == ("not finite", "3.0000")


def test_text_is_aligned_with_a_line_a_judgement(make_run):
    comparison = compare([make_run("a"), make_run("b", "block", loss=2.9), make_run("c", "full", loss=2.8)])
    lines = text(comparison).splitlines()
    assert len({len(line) for line in lines[: 2 + len(comparison.rows)]}) == 1
    assert lines[-4].startswith("The arms differ in model.depth.rule (residual, block, full).")
    assert [line.split(" by ")[0] for line in lines[-3:]] == [
        "tiny_block is lower than tiny_residual",
        "tiny_full is lower than tiny_residual",
        "tiny_full is lower than tiny_block",
    ]


def test_many_arms_are_held_against_the_first(make_run):
    rates = (1e-3, 2e-3, 3e-3, 4e-3)
    runs = [make_run(f"r{rate}", overrides=[f"optimizer.learning_rate={rate}"], loss=3 + rate) for rate in rates]
    judgements = compare(runs).judgements
    assert len(judgements) == 3 and all("(learning_rate=0.001) by" in judgement.sentence for judgement in judgements)


def test_other_tokenizers_are_compared_in_bits_per_byte(make_run):
    comparison = compare([make_run("a"), make_run("b", "block", loss=2.0, overrides=["model.vocab_size=512"])])
    assert "lower than tiny_residual by 0.5000 bits/byte" in comparison.judgements[0].sentence
    assert text(comparison).startswith("warning: Different data: model.vocab_size")


def script(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "compare.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_script_prints_the_table_and_writes_the_report(make_run, tmp_path):
    a, b, report = make_run("a"), make_run("b", "block"), tmp_path / "deep" / "report.html"
    done = script(a, b, f"--report={report}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{text(compare([a, b]))}\n\nreport: {report}\n"
    assert report.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("missing", [False, True])
def test_script_refuses_with_one_line(tmp_path, missing):
    done = script(*[tmp_path / "none"] * missing)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert ("does not exist" if missing else "no workdir to compare") in done.stderr
