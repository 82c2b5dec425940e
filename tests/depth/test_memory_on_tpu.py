"""What Block AttnRes needs of a TPU chip's memory beside the baseline, by the compiler's own account."""

import json

import pytest
from tpu_compiler import needs_libtpu, run_python


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 8192])
def test_block_needs_n_and_4_arrays_more_than_the_baseline(tokens, tmp_path):
    path = tmp_path / "figures.json"
    flags = [f"--tokens={tokens}", "--arms=residual,block", f"--json={path}"]
    assert run_python("benchmarks/tpu_memory.py", *flags).returncode == 0
    found = {entry["name"]: entry["value"] for entry in json.loads(path.read_text())}
    for device in ("v5p:2x2x1", "v6e:2x2"):
        assert 0 < found[f"{device}/block/temp_extra_activations"] <= 8 + 4
