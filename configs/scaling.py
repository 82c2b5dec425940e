"""The five sizes of the paper's scaling laws (Attention Residuals, Table 2), with any depth rule.

Command:  python train.py --config=configs/scaling.py:size=194m,residual=block --workdir=runs/scaling/194m_block
            --config.data.source=text --config.data.files='corpus/*.jsonl'
Hardware: not tried. Planned for 8 chips of TPU v5p (v5p-16), a sequence on each at a time:
          python -m attnres_jax.parallel.plan --config=configs/scaling.py:size=528m --topology=v5p:2x2x2
            (benchmarks/results/plans-tpu.md)
Time:     not measured; the smallest size is 6 * 194e6 * 38.7e9 = 4.5e19 operations
Expected: the paper's losses, on its own data, stand beside the sizes below; no run has been made here

Table 2 gives activated parameters, tokens, layers, heads, width, expert width, learning rate and batch. Not stated
there and assumed: KDA, KDA, KDA, MLA in turn, heads of 128 for KDA, MLA as in Kimi Linear (latent 512, 128 + 64,
values 128), experts in every layer, 8 of 256 and one shared, Kimi's vocabulary of 163,840. That gives the activated
counts within 1.6 %. Unknown and chosen here: AdamW with decay 0.1, 2 % warm-up, a cosine to a tenth.
"""

from attnres_jax.config import arguments, default_config, sublayers_in_block
from attnres_jax.errors import ConfigError
from attnres_jax.models import default_block_size

# activated parameters, tokens, layers, heads, width, expert width, learning rate, sequences in a batch
SIZES = {
    "194m": (194e6, 38.7e9, 12, 12, 896, 400, 2.99e-3, 192),  # baseline 1.931, block 1.909, full 1.899
    "241m": (241e6, 45.4e9, 13, 13, 960, 432, 2.80e-3, 256),  # 1.895, 1.875, 1.874
    "296m": (296e6, 62.1e9, 14, 14, 1024, 464, 2.50e-3, 320),  # 1.829, 1.809, 1.804
    "436m": (436e6, 87.9e9, 16, 16, 1168, 528, 2.20e-3, 384),  # 1.766, 1.746, 1.737
    "528m": (528e6, 119.0e9, 17, 17, 1264, 560, 2.02e-3, 432),  # 1.719, 1.693, 1.692
}


def get_config(argument: str = ""):
    """`size`, `residual`: a depth rule, `block_size` in sublayers or `layers_per_block`, `seed`."""
    args = arguments(argument, size="194m", residual="block", block_size=0, layers_per_block=0, seed=0)
    if args.size not in SIZES:
        raise ConfigError(f"size={args.size!r} is unknown; known: {', '.join(SIZES)}")
    _, tokens, layers, heads, width, expert_width, learning_rate, batch = SIZES[args.size]
    config = default_config()
    config.name = f"scaling_{args.size}_{args.residual}"
    config.seed = args.seed
    model, data, optimizer, training = config.model, config.data, config.optimizer, config.training
    model.update(
        attention_layers="kda*3,mla",
        mlp_layers="moe",
        vocab_size=163_840,
        width=width,
        num_layers=layers,
        num_heads=heads,
        max_length=8192,
        norm_eps=1e-5,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="full",
    )
    model.kda.head_dim = 128
    model.mla.update(latent_dim=512, nope_dim=128, rope_dim=64, value_dim=128)
    model.moe.update(num_experts=256, experts_per_token=8, expert_width=expert_width, scaling=2.446)
    model.depth.rule = args.residual
    model.depth.block_size = sublayers_in_block(args.block_size, args.layers_per_block, default_block_size(layers))
    data.update(sequence_length=8192, batch_size=batch)
    config.mesh.fsdp = 8
    training.steps = round(tokens / (batch * 8192))
    training.accumulation = batch // 8  # a sequence on each of 8 devices
    training.update(log_every=10, eval_every=500, checkpoint_every=500)
    optimizer.update(learning_rate=learning_rate, final_learning_rate=learning_rate / 10)
    optimizer.warmup_steps = training.steps // 50
    return config
