"""The door of the configuration: what it accepts, and the one line it answers everything else with."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from attnres_jax import build_model, load_config
from attnres_jax.config import Config, arguments, config_from_dict, flatten, read_config, sublayers_in_block
from attnres_jax.depth import RULES
from attnres_jax.errors import ConfigError
from attnres_jax.models import activated_parameters

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")
KIMI = str(ROOT / "configs" / "tiny_kimi.py")
ABLATIONS = str(ROOT / "configs" / "ablations.py")
VARIANTS = subprocess.run([sys.executable, ABLATIONS], capture_output=True, text=True, check=True).stdout.split()


def build(spec):
    config = load_config(spec)
    model = jax.eval_shape(lambda: build_model(config.model, rngs=nnx.Rngs(config.seed)))
    assert model.embedding.table.shape == (config.model.vocab_size, config.model.width)
    return config


@pytest.mark.parametrize("rule", RULES)
def test_the_tiny_config_builds_with_every_rule(rule):
    config = build(f"{TINY}:residual={rule},seed=3")
    assert config.model.depth.rule == rule and config.seed == 3


def test_every_ablation_of_the_paper_builds_and_no_two_are_the_same():
    configs = [build(f"{ABLATIONS}:variant={variant},seed=3") for variant in VARIANTS]
    assert len({config.model.depth for config in configs}) == len(VARIANTS) == 16
    assert {config.model.depth.block_size for config in configs if config.model.depth.rule == "block"} == {
        *(2, 4, 8, 16, 32)
    }
    with pytest.raises(ConfigError, match="variant='fulll' is unknown; known: baseline, denseformer"):
        load_config(f"{ABLATIONS}:variant=fulll")


SCALING = runpy.run_path(str(ROOT / "configs" / "scaling.py"))["SIZES"]


@pytest.mark.parametrize("size", SCALING)
def test_the_scaling_sizes_have_the_papers_parameters(size):
    """Activated, embeddings excluded, within 4 % of Table 2; the steps take its tokens."""
    activated, tokens, layers, *_ = SCALING[size]
    config = load_config(f"{ROOT}/configs/scaling.py:size={size},residual=residual")
    shapes = jax.eval_shape(lambda: build_model(config.model, rngs=nnx.Rngs(0)))
    found = activated_parameters(config.model, shapes)
    print(f"{size}: {found:,} activated, {found / activated - 1:+.1%}")
    assert abs(found / activated - 1) < 0.02
    assert config.training.steps * config.data.batch_size * 8192 == pytest.approx(tokens, rel=1e-4)
    block = load_config(f"{ROOT}/configs/scaling.py:size={size},layers_per_block=3").model
    assert (block.depth.rule, block.depth.block_size, block.num_layers) == ("block", 6, layers)


@pytest.mark.parametrize("name", ["moonlight-16b-a3b", "qwen3-30b-a3b"])
def test_any_preset_trains_under_any_rule(name):
    config = build(f"{ROOT}/configs/preset.py:name={name},residual=full,block_size=4")
    assert (config.model.depth.rule, config.model.depth.block_size, config.model.remat) == ("full", 4, "full")
    with pytest.raises(ConfigError, match="preset='moonlite' is unknown"):
        load_config(f"{ROOT}/configs/preset.py:name=moonlite")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_says_how_it_is_run_and_what_comes_out(path):
    build(f"{path}:model={ROOT / 'tests/fixtures/qwen3'}" if path.stem == "finetune" else str(path))
    docstring = path.read_text().split('"""')[1]
    assert all(word in docstring for word in ("Command:", "Hardware:", "Time:", "Expected:"))


def test_arguments_and_overrides_reach_the_dataclasses():
    overrides = ["training.steps=7", "optimizer.warmup_steps=2", "optimizer.learning_rate=1e-2", "model.qk_norm=False"]
    config = load_config(f"{TINY}:residual=full,block_size=2", overrides)
    assert (config.model.depth.rule, config.model.depth.block_size) == ("full", 2)
    assert (config.training.steps, config.optimizer.learning_rate, config.model.qk_norm) == (7, 1e-2, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    "spec, overrides, message",
    [
        ("nowhere.py", [], "config file 'nowhere.py' does not exist"),
        (TINY.replace("tiny", "tyny"), [], "did you mean"),
        (TINY + ":residul=block", [], "config argument key 'residul' is unknown; did you mean 'residual'?"),
        (
            TINY + ":block",
            [],
            "'block' is not of the form key=value; known keys: residual, block_size, layers",
        ),
        (TINY + ":seed=one", [], "config argument seed='one' must be int"),
        (TINY + ":residual=blok", [], "model.depth.rule='blok' is unknown; known: residual, rezero, layerscale"),
        (TINY, ["training.step=3"], "key 'training.step' is unknown; did you mean 'training.steps'?"),
        (TINY, ["trainin.steps=3"], "did you mean 'training.steps'?"),
        (TINY, ["training.steps=3.5"], "training.steps='3.5' must be int"),
        (TINY, ["model.qk_norm=maybe"], "model.qk_norm='maybe' must be bool"),
        (TINY, ["training.steps"], "'training.steps' is not of the form key=value"),
        (TINY, ["training.steps=0"], "training.steps=0 must be positive"),
        (TINY, ["model.num_heads=3"], "not divisible by model.num_heads=3; nearest: model.num_heads=2"),
        (TINY, ["model.num_kv_heads=3"], "not divisible by model.num_kv_heads=3; nearest: model.num_kv_heads=2"),
        (TINY, ["model.head_dim=5"], "model.head_dim=5 must be even and positive"),
        (TINY, ["model.depth.block_size=3"], "model.depth.block_size=3 sublayers does not fit 16 sublayers"),
        (TINY, ["model.depth.block_size=40"], "nearest: model.depth.block_size=16"),
        (TINY, ["model.depth.windw=3"], "key 'model.depth.windw' is unknown; did you mean 'model.depth.window'?"),
        (TINY, ["model.depth.weights=soft"], "model.depth.weights='soft' is unknown; known: softmax, sigmoid"),
        (TINY, ["model.depth.streams=2"], "model.depth.streams=2 is no option of block; its options: query, weights"),
        (TINY, ["model.depth.sum_sources=true", "model.depth.window=2"], "sum_sources=True needs weights='softmax'"),
        (TINY, ["model.rope_scaling.kind=yarm"], "model.rope_scaling.kind='yarm' is unknown; known: none, llama3"),
        (TINY, ["model.rope_scaling.high_frequency_factor=1"], "high_frequency_factor=1.0 must be above"),
        (TINY, ["model.depth.heads=3"], "not divisible by model.depth.heads=3; nearest: model.depth.heads=2"),
        (TINY + ":residual=rms_block,block_size=1", [], "model.depth.block_size=1 leaves rms_block nothing to sum"),
        (TINY, ["data.sequence_length=512"], "longer than model.max_length=256; set data.sequence_length=256"),
        (TINY, ["training.accumulation=3"], "not divisible by training.accumulation=3; nearest: data.batch_size=9"),
        (TINY, ["optimizer.warmup_steps=300"], "nearest: optimizer.warmup_steps=299"),
        (TINY, ["data.source=txt"], "data.source='txt' is unknown; known: stdlib, text; nearest: 'text'"),
        (TINY, ["data.source=text"], "needs data.files"),
        (TINY, ["data.files=*.txt"], "read only with data.source='text'"),
        (TINY, ["data.heldout_percent=0"], "data.heldout_percent=0 must be from 1 to 50"),
        (TINY, ["model.dtype=float16"], "model.dtype='float16' is unknown; known: float32, bfloat16"),
        (TINY, ["optimizer.beta2=1.0"], "optimizer.beta2=1.0 must be at least 0 and below 1"),
        (TINY, ["optimizer.weight_decay=inf"], "optimizer.weight_decay=inf must be finite"),
        (TINY, ["model.depth.recency_bias=nan"], "model.depth.recency_bias=nan must be finite"),
        (TINY, ["model.depth.windw=3"], "known in model.depth: block_size, heads, "),
        (TINY, ["model.depth=full"], "key 'model.depth' is a group of keys; known in model.depth: block_size, heads, "),
        (
            TINY,
            ["model.dept=3"],
            "did you mean 'model.depth'? known in model: activation, attention, ",
        ),
        (TINY, ["depth.rule=full"], "did you mean 'model.depth.rule'?"),
        (TINY, ["model.zzzz=3"], "key 'model.zzzz' is unknown; known in model: activation, "),
        (TINY, ["optimizer.weight_decay=-1"], "optimizer.weight_decay=-1.0 must not be negative"),
        (TINY, ["metrics.every=0"], "metrics.every=0 must be positive"),
        (TINY, ["optimizer.depth_query_lr_multiplier=-1"], "depth_query_lr_multiplier=-1.0 must not be negative"),
        (TINY, ["model.attention_layers=gqa,mlaa"], "model.attention_layers='gqa,mlaa': 'mlaa' is unknown; known: gqa"),
        (TINY, ["model.mlp_layers=moe*,swiglu"], "model.mlp_layers='moe*,swiglu': 'moe*' fills the rest"),
        (KIMI, ["model.moe.experts_per_token=17"], "nearest: model.moe.experts_per_token=16"),
        (KIMI, ["model.moe.num_groups=5"], "not divisible by model.moe.num_groups=5; nearest: model.moe.num_groups=4"),
        (KIMI, ["model.moe.num_groups=16"], "nearest: model.moe.top_groups=2"),
        (KIMI, ["model.moe.router_activation=relu"], "model.moe.router_activation='relu' is unknown"),
        (KIMI, ["model.kda.gate_lower_bound=5"], "must be negative, or 0 for the unbounded gate; nearest: -5.0"),
        (KIMI, ["model.mla.rotary=true", "model.mla.rope_dim=3"], "nearest: model.mla.rope_dim=4"),
        (KIMI, ["model.mla.latent_dim=0"], "model.mla.latent_dim=0 must be positive"),
        (KIMI, ["model.experts=fast"], "model.experts='fast' is unknown; known: auto, ragged, sorted, dense"),
        (KIMI, ["model.expert_exchange=fast"], "model.expert_exchange='fast' is unknown; known: auto, routed, dense"),
        (KIMI, ["model.experts=dense", "model.expert_exchange=routed"], "nearest: model.experts='auto'"),
        (KIMI, ["model.expert_capacity=-1.0"], "model.expert_capacity=-1.0"),
        (KIMI, ["training.router_bias_until=2"], "training.router_bias_until=2.0 must be from 0 to 1"),
        (
            TINY,
            ["pipeline.transport=cache"],
            "pipeline.transport='cache' is unknown; known: cached, naive; nearest: 'cached'",
        ),
        (
            TINY,
            ["pipeline.schedule=zigzag"],
            "pipeline.schedule='zigzag' is unknown; known: gpipe, 1f1b, interleaved_1f1b",
        ),
        (TINY, ["pipeline.virtual_stages=0"], "pipeline.virtual_stages=0 must be positive"),
        (TINY, ["training.z_loss=-1"], "training.z_loss=-1.0 must not be negative"),
        (TINY, ["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan must be positive"),
        (TINY, ["optimizer.learning_rate=inf"], "optimizer.learning_rate=inf must be finite"),
        (
            TINY,
            ["optimizer.learning_rate=1e-4"],
            "optimizer.final_learning_rate=0.0003 is above optimizer.learning_rate",
        ),
        (TINY, ["optimizer.clip_norm=0"], "optimizer.clip_norm=0.0 must be positive"),
        (KIMI, ["model.kda.gate_lower_bound=nan"], "model.kda.gate_lower_bound=nan must be finite"),
        (TINY, [f"seed={2**32}"], f"seed={2**32} must be from 0 to {2**32 - 1}"),
        (str(ROOT / "pyproject.toml"), [], "is no Python file"),
    ],
)
def test_errors_are_one_line_that_names_key_value_and_way_out(spec, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(spec, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_suggested_that_is_not_alike():
    with pytest.raises(ConfigError, match=r"model\.depth\.rule='nope' is unknown; known: .*, muddformer$"):
        load_config(TINY, ["model.depth.rule=nope"])


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.model.widht = 64", "bad.py: config key 'model.widht' is unknown; did you mean 'model.width'?"),
        ("config.model.width = 'wide'", "bad.py: model.width='wide' must be int, not str"),
        ("config.model.depth = 'full'", "model.depth='full' must be a group of keys, not str; known in model.depth: "),
        ("config.model.depth.rule = 'ful'", "model.depth.rule='ful' is unknown"),
        ("return None", "bad.py: get_config returns NoneType; it is to return default_config(), changed"),
        ("config.model.width = int('wide')", "bad.py:4: ValueError: invalid literal for int()"),
        ("config.model.width = config.widht", "bad.py:4: AttributeError: "),
        ("from attnres_jax.config import default_cfg", "bad.py:4: ImportError: cannot import name 'default_cfg'"),
        ("raise ValueError('two\\nlines')", "bad.py:4: ValueError: two lines"),
        ("config.model.width = ", "bad.py:4: SyntaxError: "),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_that_says_where(line, message, tmp_path):
    head = "from attnres_jax.config import default_config\ndef get_config(_):\n  config = default_config()\n"
    (tmp_path / "bad.py").write_text(f"{head}  {line}\n  return config\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "bad.py"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_group_replaced_in_a_config_file_can_still_be_overridden(tmp_path):
    (tmp_path / "a.py").write_text(
        "from attnres_jax.config import default_config\n"
        "def get_config(_):\n  config = default_config()\n  config.model.depth = {'rule': 'full'}\n  return config\n"
    )
    depth = load_config(str(tmp_path / "a.py"), ["model.depth.window=3"]).model.depth
    assert (depth.rule, depth.window) == ("full", 3)


def test_json_round_trip(tmp_path):
    config = load_config(TINY)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert read_config(path) == config
    assert flatten(config)["model.depth.rule"] == "block"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_config(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        read_config(path)
    path.write_text('{"model": {"foo": 1}}')
    with pytest.raises(ConfigError, match=rf"^{path}: config key 'model\.foo' is unknown"):
        read_config(path)
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        read_config(path / "config.json")
    with pytest.raises(ConfigError, match="is not the workdir of a run"):
        read_config(tmp_path / "nothing" / "config.json")
    with pytest.raises(ConfigError, match="must be a group of keys"):
        config_from_dict({"model": 3})
    assert config_from_dict({}) == Config()


def test_blocks_are_said_in_sublayers_or_in_layers():
    assert load_config(f"{TINY}:layers_per_block=4").model.depth.block_size == 8
    assert sublayers_in_block(0, 3, 4) == sublayers_in_block(6, 3, 4) == sublayers_in_block(6, 0, 4) == 6
    assert sublayers_in_block(0, 0, 4) == 4
    with pytest.raises(ConfigError, match="layers_per_block=3 is block_size=6"):
        sublayers_in_block(4, 3, 4)


def test_arguments_take_the_types_of_their_defaults():
    args = arguments("a=2,c=true,d=x=y", a=1, b=0.5, c=False, d="")
    assert (args.a, args.b, args.c, args.d) == (2, 0.5, True, "x=y")


def test_help_is_the_docstring_and_the_projects_own_flags():
    run = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr
    assert "Trains one run." in run.stdout and "--workdir: Directory of the run" in run.stdout
    assert "--num_processes" in run.stdout and "grain" not in run.stdout


@pytest.mark.parametrize(
    "command, message",
    [
        (["train.py", f"--config={TINY}:residual=blok", "--workdir=w"], "nearest: 'block'"),
        (["train.py", f"--config={TINY}", "--workdir=w", "--config.model.widht=3"], "did you mean 'model.width'?"),
        (["train.py", f"--config={TINY}", "--workdr=w"], "Did you mean: workdir"),
        (["eval.py", "--workdir=w"], "not the workdir of a run"),
        (["eval.py", "--workdir=w", "--step=3", "--pretrained=d"], "--step=3 is a checkpoint of the run"),
        (["compare.py", "w"], "workdir 'w' does not exist"),
        (["compare.py", "w", "--config.seed=1"], "--config.seed=1 is not understood"),
    ],
)
def test_scripts_answer_bad_input_with_one_line_and_exit_code_2(command, message, tmp_path):
    script, *rest = command
    run = subprocess.run([sys.executable, str(ROOT / script), *rest], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()
