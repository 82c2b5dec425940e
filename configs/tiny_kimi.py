"""Kimi Linear for two CPU cores: KDA, KDA, KDA, MLA in turn, one dense layer and then experts, at width 128.

Command:  python train.py --config=configs/tiny_kimi.py:residual=block,seed=0 --workdir=runs/tiny_kimi_block
Hardware: two CPU cores
Time:     4 minutes
Expected: held-out loss 5.51 with residual=block and 5.83 with residual (one seed), on the library of Python 3.11; with
          two blocks in the place of four, block_size=8, it was 5.99: short runs of so small a model scatter
"""

from attnres_jax.config import arguments, default_config, sublayers_in_block


def get_config(argument: str = ""):
    """`residual`: a depth rule; `block_size`: sublayers in a block, or `layers_per_block`: layers; `seed`."""
    args = arguments(argument, residual="block", block_size=0, layers_per_block=0, seed=0)
    config = default_config()
    config.name = f"tiny_kimi_{args.residual}"
    config.seed = args.seed
    config.model.update(
        attention_layers="kda*3,mla", mlp_layers="swiglu,moe*", vocab_size=2048, num_layers=8, tie_embeddings=False
    )
    config.model.moe.update(num_experts=16, experts_per_token=2, expert_width=64, scaling=2.446)
    config.data.sequence_length = 128
    config.model.depth.rule = args.residual
    config.model.depth.block_size = sublayers_in_block(args.block_size, args.layers_per_block, default=4)
    return config
