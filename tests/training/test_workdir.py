"""Which directories can hold a run."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnres_jax.config import Config, DataConfig, ModelConfig
from attnres_jax.errors import ConfigError
from attnres_jax.training.workdir import WorkdirError, claim, write_json

CONFIG = Config()


def begun(workdir, config=CONFIG):
    """A run with a row to lose."""
    claim(workdir, config).close()
    (workdir / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')


def refusal(workdir, config=CONFIG) -> str:
    with pytest.raises(WorkdirError) as caught:
        claim(workdir, config)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_directory_gets_the_config_and_is_found_again(tmp_path):
    workdir = tmp_path / "runs" / "a"
    with claim(workdir, CONFIG):
        assert json.loads((workdir / "config.json").read_text()) == dataclasses.asdict(CONFIG)
    with claim(workdir, CONFIG):
        pass


def test_another_config_is_refused_with_the_differing_keys_and_both_values(tmp_path):
    begun(tmp_path)
    other = dataclasses.replace(CONFIG, seed=3, model=ModelConfig(width=64))
    message = refusal(tmp_path, other)
    assert "seed=0 there, 3 asked" in message
    assert "model.width=128 there, 64 asked" in message
    assert "num_layers" not in message


def test_a_run_that_never_began_takes_another_config(tmp_path):
    """A typo in data.files ends a run after its config is written: the corrected command is to work."""
    claim(tmp_path, CONFIG).close()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    other = dataclasses.replace(CONFIG, seed=3)
    claim(tmp_path, other).close()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
    (tmp_path / "checkpoints" / "10").mkdir()
    assert "seed=3 there, 0 asked" in refusal(tmp_path)


def test_another_cache_directory_is_the_same_run(tmp_path):
    begun(tmp_path)
    claim(tmp_path, dataclasses.replace(CONFIG, data=DataConfig(cache_dir="/elsewhere"))).close()


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert "is a file" in refusal(path)
    assert "cannot be written" in refusal(path / "below")


def test_unrelated_files_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert "thesis.tex" in refusal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_kill_left_before_the_config_was_written_is_no_obstacle(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "config.json.tmp").write_text('{"na')
    claim(tmp_path, CONFIG).close()


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        claim(tmp_path, CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in refusal(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no file system at hand that root cannot write to")
def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    assert "cannot be written" in refusal(Path("/proc/run"))


def test_a_directory_in_use_is_refused_until_its_process_ends(tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); input()"
    other = subprocess.Popen(
        [sys.executable, "-u", "-c", hold, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    assert "in use" in refusal(tmp_path)
    other.kill()
    other.wait()
    claim(tmp_path, CONFIG).close()


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
