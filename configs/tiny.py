"""A decoder for two CPU cores: 8 layers of width 128 on the source of Python's standard library.

Command:  python train.py --config=configs/tiny.py:residual=block,seed=0 --workdir=runs/tiny_block
Hardware: two CPU cores
Time:     2 minutes (`make demo` trains three arms)
Expected: held-out loss 5.65 with residual=block, 5.66 with full, 5.79 with residual, on the library of Python 3.11
"""

from attnres_jax.config import arguments, default_config, sublayers_in_block


def get_config(argument: str = ""):
    """`residual`: a depth rule; `block_size`: sublayers in a block, or `layers_per_block`: layers; `seed`."""
    args = arguments(argument, residual="block", block_size=0, layers_per_block=0, seed=0)
    config = default_config()
    config.name = f"tiny_{args.residual}"
    config.seed = args.seed
    config.model.vocab_size = 2048
    config.data.sequence_length = 128
    config.model.depth.rule = args.residual
    config.model.depth.block_size = sublayers_in_block(args.block_size, args.layers_per_block, default=4)
    return config
