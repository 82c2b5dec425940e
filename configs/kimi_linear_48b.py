"""Kimi Linear 48B-A3B as the paper trained it (Attention Residuals, section 5.2), under any depth rule.

Command:  python train.py --config=configs/kimi_linear_48b.py:residual=block --workdir=runs/kimi_linear_48b
            --config.data.source=text --config.data.files='corpus/*.jsonl'
Hardware: not tried. Planned for 64 chips of TPU v5p (v5p-128), where a step takes 45 of 95 GB on each:
          python -m attnres_jax.parallel.plan --config=configs/kimi_linear_48b.py --topology=v5p:4x4x4
            (benchmarks/results/plans-tpu.md)
Time:     not measured
Expected: no run has been made here. This is the paper's first phase, of 1T tokens; its Table 3 is after a second one
          of 0.4T

Blocks of three layers: nine and the embedding, ten sources. A batch is 8M tokens, as there, in 32
micro-batches. The paper's optimizer is Muon under a warm-up-stable-decay schedule, and its learning rate is not stated:
AdamW, a cosine and Kimi Linear's own rate stand in for them.
"""

import dataclasses

from ml_collections import ConfigDict

from attnres_jax.config import arguments, default_config, sublayers_in_block
from attnres_jax.models import preset


def get_config(argument: str = ""):
    """`residual`: a depth rule, `block_size` in sublayers or `layers_per_block`, `seed`."""
    args = arguments(argument, residual="block", block_size=0, layers_per_block=0, seed=0)
    config = default_config()
    config.name = f"kimi_linear_48b_{args.residual}"
    config.seed = args.seed
    block_size = sublayers_in_block(args.block_size, args.layers_per_block, default=6)
    config.model = ConfigDict(dataclasses.asdict(preset("kimi-linear-48b-a3b", args.residual, block_size)))
    config.model.remat = "full"
    config.model.expert_exchange = "dense"  # routed, with room for the worst case, takes 100 GB on each
    config.data.update(sequence_length=4096, batch_size=2048)
    config.training.update(steps=119_209, accumulation=32, log_every=10, eval_every=1000, checkpoint_every=1000)
    config.mesh.update(fsdp=8, expert=8)  # 64 devices, a sequence on each
    config.optimizer.update(learning_rate=1.1e-3, final_learning_rate=1.1e-4, warmup_steps=2000)
    return config
