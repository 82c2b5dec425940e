"""The ablations of the paper as one sweep: Table 4 and Figure 6 of Attention Residuals, at a size for two CPU cores.

Command:  for v in $(python configs/ablations.py); do
            python train.py --config=configs/ablations.py:variant=$v --workdir=runs/ablations/$v; done
          python compare.py runs/ablations/* --report=runs/ablations/report.html
Hardware: two CPU cores
Time:     100 minutes for all, at the lowest priority beside other work; 3 minutes the baseline by itself
Expected: baseline 5.868, block 5.688, full 5.713 (one seed); all of them in benchmarks/results/ablations-cpu.md. The
          paper's losses stand beside the variants below
"""

from attnres_jax.config import arguments, default_config
from attnres_jax.errors import ConfigError

# Like the paper's 436M model: 16 layers, so 32 sublayers; the numbers are its validation losses.
VARIANTS = {
    "baseline": {"rule": "residual"},  # 1.766
    "denseformer": {"rule": "denseformer"},  # 1.767
    "mhc": {"rule": "mhc"},  # 1.747
    "full": {"rule": "full"},  # 1.737
    "full_input_query": {"rule": "full", "query": "input"},  # 1.731
    "full_scalars": {"rule": "full", "query": "none"},  # 1.749
    "full_sigmoid": {"rule": "full", "weights": "sigmoid"},  # 1.741
    "full_no_key_norm": {"rule": "full", "key_norm": False},  # 1.743
    "full_window": {"rule": "full", "window": 8},  # 1.764
    "block": {"rule": "block", "block_size": 4},  # 1.746
    "block_heads": {"rule": "block", "block_size": 4, "heads": 16},  # 1.752
    "block_no_key_norm": {"rule": "block", "block_size": 4, "key_norm": False},  # 1.750
    "block_s2": {"rule": "block", "block_size": 2},  # 1.746
    "block_s8": {"rule": "block", "block_size": 8},  # 1.748
    "block_s16": {"rule": "block", "block_size": 16},  # 1.753
    "block_s32": {"rule": "block", "block_size": 32},  # 1.757
}


def get_config(argument: str = ""):
    """`variant`: a row of the tables; `seed`."""
    args = arguments(argument, variant="block", seed=0)
    if args.variant not in VARIANTS:
        raise ConfigError(f"variant={args.variant!r} is unknown; known: {', '.join(VARIANTS)}")
    config = default_config()
    config.name = args.variant
    config.seed = args.seed
    config.model.vocab_size = 2048
    config.model.num_layers = 16
    config.data.sequence_length = 128
    config.model.depth.update(VARIANTS[args.variant])
    return config


if __name__ == "__main__":
    print(*VARIANTS)
