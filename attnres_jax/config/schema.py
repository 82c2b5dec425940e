"""What can be set, as frozen dataclasses with their defaults, and what follows from a setting alone."""

import dataclasses
from typing import Any

from attnres_jax.depth import Options
from attnres_jax.pattern import expand


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig(Options):
    """Which rule decides what a sublayer reads from the earlier ones, and its options."""

    rule: str = "block"
    """A name in `attnres_jax.depth.RULES`."""
    block_size: int = 4
    """Sublayers in a block (two per transformer layer): 1 or even. Where a rule has no blocks it is only a schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """How rotary frequencies are changed for contexts longer than the one trained on."""

    kind: str = "none"
    """none, llama3 (Llama 3.1) or yarn (the DeepSeek family): `layers/rotary.py`."""
    factor: float = 8.0
    """What slow frequencies are divided by."""
    original_length: int = 8192
    """Tokens of the context trained on."""
    low_frequency_factor: float = 1.0
    """llama3: like the next."""
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    """yarn: like the next three."""
    beta_slow: float = 1.0
    mscale: float = 0.0
    """0: not given."""
    mscale_all_dim: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention, where `attention_layers` has it: `layers/mla.py`."""

    latent_dim: int = 32
    nope_dim: int = 32
    """Of a head's key from the latent."""
    rope_dim: int = 16
    """Of the key part that all heads share."""
    value_dim: int = 32
    query_rank: int = 0
    """0: queries by one full projection."""
    rotary: bool = False
    rotary_interleaved: bool = False
    output_gate: bool = False
    latent_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDAConfig:
    """Kimi Delta Attention, where `attention_layers` has it: `layers/kda.py`."""

    num_heads: int = 0
    """0: the model's."""
    head_dim: int = 32
    """Of keys and of values."""
    conv_size: int = 4
    gate_lower_bound: float = 0.0
    """Smallest log decay of a step, negative (Kimi K3: -5); 0: the unbounded gate of Kimi Linear."""
    full_rank_gate: bool = False
    """The output gate from one matrix (Kimi K3), not from a low-rank pair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts, where `mlp_layers` has it: `layers/moe.py`."""

    num_experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 128
    num_shared: int = 1
    """Experts that every token takes."""
    shared_width: int = 0
    """Of one of them; 0: `expert_width`."""
    router_activation: str = "sigmoid"
    """sigmoid or softmax."""
    renormalise: bool = True
    """Divide the weights of the chosen experts by their sum."""
    scaling: float = 1.0
    """What the weights are multiplied with at last."""
    num_groups: int = 1
    top_groups: int = 1
    """A token chooses within so many of `num_groups` groups of experts."""
    correction_bias: bool = True
    """Whether the choice of experts has a score correction, which training moves: `training.router_bias_rate`."""
    biased_weights: bool = False
    """The score correction enters the weights too, as in Kimi Linear's remote code at Hugging Face."""
    latent_width: int = 0
    """LatentMoE (Kimi K3): what experts read and write; 0: the model's width."""
    latent_norm: bool = True

    @property
    def all_shared_width(self) -> int:
        """Of the shared experts together, which are one MLP."""
        return self.num_shared * (self.shared_width or self.expert_width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder."""

    attention_layers: str = "gqa"
    """Pattern of kinds over the layers, of gqa, mla and kda: `kda*3,mla` is repeated to the end; see `pattern.py`."""
    mlp_layers: str = "swiglu"
    """Pattern of swiglu and moe: `swiglu,moe*` is one dense layer, then experts."""
    vocab_size: int = 4096
    width: int = 128
    num_layers: int = 8
    """Transformer layers; each holds two sublayers."""
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 0
    """0: width / num_heads."""
    mlp_width: int = 384
    """Of the layers without experts."""
    activation: str = "silu"
    """Of all feed-forward layers: silu, or situ (Kimi K3)."""
    max_length: int = 256
    """Longest sequence, in tokens."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    norm_eps: float = 1e-6
    qk_norm: bool = True
    """RMS-normalise queries and keys of the attention before rotation."""
    tie_embeddings: bool = True
    dtype: str = "float32"
    """Of activations and matmuls: float32 or bfloat16. Parameters are float32, or as a loaded checkpoint has them."""
    remat: str = "none"
    """What a block keeps for its backward pass: everything (none), matmul outputs (dots), its input only (full)."""
    attention: str = "auto"
    """Kernel of gqa and mla: auto, xla, cudnn (gqa only) or splash (TPU); see `layers/softmax_attention.py`."""
    experts: str = "auto"
    """How the experts are multiplied: auto, ragged, sorted or dense; see `layers/experts.py`."""
    expert_exchange: str = "auto"
    """How tokens get to experts on other devices: auto, routed or dense; see `layers/expert_exchange.py`."""
    expert_capacity: float = 0.0
    """Room that a device has in a routed exchange, in even shares of the assignments; what is beyond is dropped. 0: for
    all there could be."""
    mla: MLAConfig = MLAConfig()
    kda: KDAConfig = KDAConfig()
    moe: MoEConfig = MoEConfig()
    depth: DepthConfig = DepthConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, its tokens and how they are packed."""

    source: str = "stdlib"
    """stdlib (the source of the running Python's standard library) or text (the files that `files` matches)."""
    files: str = ""
    """With source=text: a glob of .txt (one document a file) or .jsonl files (a "text" field a line)."""
    tokenizer: str = ""
    """A model directory or hub repository whose tokenizer is used; empty: one is trained on the text."""
    heldout_percent: int = 5
    """Share of the documents, chosen by hash of their name, kept for evaluation."""
    sequence_length: int = 256
    batch_size: int = 8
    """Sequences in a batch, over all processes and all accumulation steps."""
    cache_dir: str = ""
    """Where the tokenizer and the tokens are kept; empty: $ATTNRES_CACHE, else ~/.cache/attnres_jax."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    warmup_steps: int = 20
    weight_decay: float = 0.1
    """On matrices only: norms do not decay, and depth parameters as `depth_weight_decay` says."""
    depth_weight_decay: float = 0.0
    """On every parameter of the depth rule, matrix or not."""
    depth_query_decay_multiplier: float = 1.0
    """Of `depth_weight_decay` for depth queries. 0: none."""
    depth_key_scale_decay_multiplier: float = 1.0
    """The same for depth key scales, which decay towards zero, where no source is told from another."""
    depth_query_lr_multiplier: float = 1.0
    """The learning rate (and decay) of depth queries over everybody else's."""
    depth_key_scale_lr_multiplier: float = 1.0
    """The same of depth key scales. 0 leaves them as they are."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop."""

    init_from: str = ""
    """A model directory or hub repository whose parameters the run starts from; empty: fresh ones."""
    steps: int = 300
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the output softmax."""
    router_balance_loss: float = 1e-4
    """Weight of the experts' sequence-wise balance loss (DeepSeek-V3), a mean over the layers that have experts."""
    router_z_loss: float = 0.0
    """Weight of the routers' squared log-partition (ST-MoE), a mean over layers."""
    router_bias_rate: float = 1e-3
    """Step of the score corrections that keep the experts' load even (Wang et al., 2024; Moonlight, appendix C)."""
    router_bias_until: float = 0.97
    """Share of the steps after which the score corrections stay as they are (DeepSeek-V3: the last 3 %)."""
    log_every: int = 10
    eval_every: int = 100
    eval_sequences: int = 64
    """Size of the fixed held-out set, in sequences."""
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    process_timeout: int = 100
    """Of several processes: seconds they wait for each other when they start and end, and after which one that gives no
    sign of life counts as dead, which ends the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is measured beside the step's own metrics."""

    depth: bool = False
    """Whether outputs, their gradients and depth weights are measured by sublayer: `training/diagnostics.py`."""
    every: int = 50
    """Steps between two such measurements."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis: `parallel/mesh.py`. Their product is the number of devices; one axis may be -1, all the rest."""

    data: int = -1
    """Parts of the batch, on each the whole model."""
    fsdp: int = 1
    """Parts of the batch, and of every parameter."""
    tensor: int = 1
    """Parts of the heads and feed-forward channels; between the matmuls, of the sequence."""
    expert: int = 1
    """Parts of the batch, and of the experts."""
    stage: int = 1
    """Parts of the layers: see `PipelineConfig`."""
    context: int = 1
    """Parts of the sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How `training.accumulation` microbatches go through the `mesh.stage` stages; without effect on one stage."""

    schedule: str = "1f1b"
    """gpipe, 1f1b or interleaved_1f1b: `parallel/schedules.py`."""
    virtual_stages: int = 1
    """Runs of layers on each stage; more than one for interleaved_1f1b."""
    transport: str = "cached"
    """Which sources travel: those that a stage has not got (cached), or all with every hop (naive)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    name: str = "tiny"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    metrics: MetricsConfig = MetricsConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The configuration as `{"model.depth.rule": "block", ...}`."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = prefix + field.name
        flat.update(flatten(value, key + ".") if dataclasses.is_dataclass(value) else {key: value})
    return flat


def head_dim(model: ModelConfig) -> int:
    """Width of an attention head of gqa."""
    return model.head_dim or model.width // model.num_heads


def kda_heads(model: ModelConfig) -> int:
    """Heads of a KDA layer."""
    return model.kda.num_heads or model.num_heads


SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b")
TRANSPORTS = ("cached", "naive")
ATTENTION_KINDS = ("gqa", "mla", "kda")
MLP_KINDS = ("swiglu", "moe")


def attention_kinds(model: ModelConfig) -> list[str]:
    """The kind of attention in every layer, of `ATTENTION_KINDS`."""
    return expand(model.attention_layers, model.num_layers, ATTENTION_KINDS)


def mlp_kinds(model: ModelConfig) -> list[str]:
    """The kind of feed-forward sublayer in every layer, of `MLP_KINDS`."""
    return expand(model.mlp_layers, model.num_layers, MLP_KINDS)
