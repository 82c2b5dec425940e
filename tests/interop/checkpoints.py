"""Checkpoint directories for tests: the committed ones, and small ones made here."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from attnres_jax import ModelConfig, build_model
from attnres_jax.config import DepthConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = ("llama", "qwen3", "qwen3_moe", "deepseek_v3", "moonlight", "kimi_linear")
COMPANIONS = {
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja"),
}
TINY = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=5,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=24,
    max_length=64,
    depth=DepthConfig(rule="block", block_size=4),  # the last of three blocks is short
)


def drawn(config=TINY):
    """A model whose queries and key scales do something."""
    model = build_model(config, rngs=nnx.Rngs(0))
    if config.depth.rule != "residual":
        keys = jax.random.split(jax.random.key(5), 2)
        model.sites.query[...] = 0.3 * jax.random.normal(keys[0], model.sites.query.shape)
        model.sites.key_scale[...] = jax.random.uniform(keys[1], model.sites.key_scale.shape, minval=0.5, maxval=1.5)
    return model


def copy(case, target):
    """A copy of a committed directory without its parity file, to be changed."""
    shutil.copytree(FIXTURES / case, target, ignore=shutil.ignore_patterns("*.npz"))
    return target


def tensors(directory):
    """All tensors of a directory, as they are."""
    return {name: x for path in sorted(Path(directory).glob("*.safetensors")) for name, x in load_file(path).items()}


def stored(directory):
    """The same of numbers that NumPy does not have: (dtype, shape, bytes)."""
    found = {}
    for path in Path(directory).glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                found[name] = entry["dtype"], entry["shape"], data[begin:end]
    return found


def rewrite(directory, change):
    """Changes the tensors of a directory of one file."""
    path = directory / "model.safetensors"
    held = load_file(path)
    change(held)
    save_file({name: np.ascontiguousarray(x) for name, x in held.items()}, path, metadata={"format": "pt"})


def edit_config(directory, **changes):
    """Changes keys of config.json; None removes one."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def tokens(vocab=40, shape=(2, 12)):
    return jnp.asarray(np.random.default_rng(3).integers(0, vocab, shape), jnp.int32)


def same_bytes(left, right):
    """Two dicts of tensors: the same names, dtypes, shapes and bytes."""
    assert set(left) == set(right)
    return all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and left[n].tobytes() == right[n].tobytes()
        for n in left
    )
