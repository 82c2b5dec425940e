"""A released architecture from scratch, under any depth rule: the presets of `attnres_jax/models`.

Command:  python train.py --config=configs/preset.py:name=qwen3-0.6b,residual=block --workdir=runs/qwen3
            --config.data.source=text --config.data.files='corpus/*.jsonl'
Hardware: what the size asks for; `python -c "from attnres_jax.models import PRESETS; print(*PRESETS)"` names them
Time:     not measured
Expected: no run has been made here. Weights of the released models are another matter: `attnres_jax.interop`
"""

import dataclasses

from ml_collections import ConfigDict

from attnres_jax.config import arguments, default_config, sublayers_in_block
from attnres_jax.models import preset


def get_config(argument: str = ""):
    """`name` of a preset, `residual`: a depth rule, `block_size` in sublayers or `layers_per_block`, `seed`."""
    args = arguments(argument, name="qwen3-0.6b", residual="block", block_size=0, layers_per_block=0, seed=0)
    config = default_config()
    config.name = f"{args.name}_{args.residual}"
    config.seed = args.seed
    block_size = sublayers_in_block(args.block_size, args.layers_per_block, default=0)
    config.model = ConfigDict(dataclasses.asdict(preset(args.name, args.residual, block_size)))
    config.model.remat = "full"
    config.data.sequence_length = min(4096, config.model.max_length)
    config.training.steps = 10_000
    config.optimizer.update(learning_rate=4e-4, final_learning_rate=4e-5, warmup_steps=200)
    return config
