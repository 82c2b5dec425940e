from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

from attnres_jax.depth import RULES

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def execute(monkeypatch):
    """`execute("01_inspect", NAME="value")` runs a notebook in that environment: (what it printed, its pictures)."""

    def execute(name, **environment):
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        for setting in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
            monkeypatch.setenv(setting.upper(), str(getattr(jax.config, setting)))
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        (path,) = (path for path in NOTEBOOKS if path.stem == name)
        notebook = nbformat.read(path, as_version=4)
        place = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        printed = [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
        return "".join(printed), [output for output in outputs if "image/png" in output.get("data", {})]

    return execute


def test_inspection_draws_a_trained_run(real_run, execute):
    printed, pictures = execute("01_inspect", ATTNRES_RUN=str(real_run))
    assert len(pictures) == 3
    assert f"{real_run}: block, 4 sublayers, step 8" in printed
    assert "attention 1 reads most from embedding    1.000   (even: 1.000)" in printed


def test_depth_rules_are_trained_drawn_and_measured(small, execute):
    printed, pictures = execute(
        "02_depth_rules", ATTNRES_SETTINGS=" ".join([*small, "training.steps=4", "model.num_layers=1"])
    )
    assert len(pictures) == 2
    lines = printed.splitlines()
    assert [line.split(":")[0].strip() for line in lines if "held-out loss" in line] == list(RULES)
    table = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines[-len(RULES) :]}
    assert list(table) == list(RULES) and {len(row) for row in table.values()} == {6}
    assert table["residual"][1] == table["residual"][5] == 1  # evenness, separable rank
    assert table["rezero"][2] > 0.9  # sharpness: it starts as the identity


def test_a_residual_model_is_converted_proved_and_fine_tuned(small, execute):
    printed, pictures = execute(
        "03_convert", ATTNRES_SETTINGS=" ".join([*small, "training.steps=4", "model.num_layers=3"]), ATTNRES_STEPS="4"
    )
    assert len(pictures) == 1
    lines = printed.splitlines()
    assert "3 layers of width" in printed and "depth rule residual" in printed
    logits = float(next(line for line in lines if line.startswith("logits: ")).split()[1])
    assert logits < 2e-5
    queries = next(line for line in lines if line.startswith("queries: ")).split()
    assert float(queries[3]) == 0 < float(queries[5])
    assert "reloaded bit for bit: True" in printed
    assert "other weights: " in lines[-1] and "the model has been trained since it was converted" in lines[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
