"""A model that is there already, trained further: as it is, or a residual one turned into Block AttnRes on the way.

Command:  python train.py --config=configs/finetune.py:model=Qwen/Qwen3-0.6B,residual=block --workdir=runs/qwen3
            --config.data.source=text --config.data.files='corpus/*.jsonl'
Hardware: what the model asks for: in float32, parameters, their gradients and Adam's two moments are 16 bytes each
Time:     not measured
Expected: the held-out loss of step 0 is that of the model as it is, under block and full too, and falls from there.
          No released weights were at hand; the tests train small models with both kinds of tokenizers
"""

import dataclasses

from ml_collections import ConfigDict

from attnres_jax.config import arguments, default_config
from attnres_jax.errors import ConfigError
from attnres_jax.interop import pretrained_config


def get_config(argument: str = ""):
    """`model`: a directory or hub repository, `residual`: a depth rule for a residual one (empty: as it is), `seed`."""
    args = arguments(argument, model="", residual="", seed=0)
    if not args.model:
        raise ConfigError("which model? give a directory or hub repository: configs/finetune.py:model=Qwen/Qwen3-0.6B")
    config = default_config()
    config.name = f"finetune_{args.residual}" if args.residual else "finetune"
    config.seed = args.seed
    config.model = ConfigDict(dataclasses.asdict(pretrained_config(args.model, args.residual or None)))
    config.model.remat = "full"
    config.data.tokenizer = args.model
    config.data.sequence_length = min(1024, config.model.max_length)
    config.training.init_from = args.model
    config.training.steps = 1_000
    config.optimizer.update(learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=50, weight_decay=0.0)
    return config
