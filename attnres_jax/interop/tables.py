"""Which tensor of a checkpoint holds which parameter: one table a family, as data.

To add a family: its file in `models/` (settings and presets), a line in `models/families.py`, and its table here. A
kind of sublayer that is new needs its rows once; families differ in little more than prefixes.
"""

import dataclasses
from collections.abc import Mapping

SAME: tuple[int, ...] = ()
MATRIX = (1, 0)
"""torch's Linear keeps [outputs, inputs]."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter here and what it is called there.

    Attributes:
      ours: dotted name, of a sublayer's parameter without its stack.
      theirs: tensor name, of a sublayer's behind `layers.{layer}.`; `{expert}` stands for the number of an expert:
        experts are one stack here, behind the axis of sublayers.
      axes: axis i here is axis `axes[i]` there; `SAME`: the same axes.
      rank: how many axes it has there; those not in `axes` have size 1. 0: no others.
      dtype: what the parameter is held in, and written in, whatever the checkpoint's dtype; None: as stored.
      multiple: there, the first axis is filled with zeros up to a multiple of this.
      other: a second name that it may be found under.
      loose: whether a vector may be stored with other axes of size 1 than these, or be longer and read from its start.
    """

    ours: str
    theirs: str
    axes: tuple[int, ...] = SAME
    rank: int = 0
    dtype: str | None = None
    multiple: int = 1
    other: str = ""
    loose: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """The tensors of a family. A row whose parameter a model does not have (q/k norm, an untied head) is skipped.

    Attributes:
      prefix: of all tensors, as in `language_model.`.
      whole: parameters outside the stack.
      sublayers: by kind of sublayer, the parameters of one.
      ignored: patterns of tensors that may be there and are not read (`fnmatch`), behind the prefix.
      ignored_outside: patterns of whole names that are not read, such as those of a vision tower.
    """

    whole: tuple[Tensor, ...]
    sublayers: Mapping[str, tuple[Tensor, ...]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    ignored_outside: tuple[str, ...] = ()


EMBEDDING = "embedding.table"
HEAD = "head.table"
DECODER = (
    Tensor(EMBEDDING, "model.embed_tokens.weight"),
    Tensor("final_norm.scale", "model.norm.weight"),
    Tensor(HEAD, "lm_head.weight"),
)

GQA = (
    Tensor("norm.scale", "input_layernorm.weight"),
    Tensor("query.kernel", "self_attn.q_proj.weight", MATRIX),
    Tensor("key.kernel", "self_attn.k_proj.weight", MATRIX),
    Tensor("value.kernel", "self_attn.v_proj.weight", MATRIX),
    Tensor("out.kernel", "self_attn.o_proj.weight", MATRIX),
    Tensor("query_norm.scale", "self_attn.q_norm.weight"),
    Tensor("key_norm.scale", "self_attn.k_norm.weight"),
)

SWIGLU = (
    Tensor("norm.scale", "post_attention_layernorm.weight"),
    Tensor("gate.kernel", "mlp.gate_proj.weight", MATRIX),
    Tensor("up.kernel", "mlp.up_proj.weight", MATRIX),
    Tensor("down.kernel", "mlp.down_proj.weight", MATRIX),
)

MLA = (
    Tensor("norm.scale", "input_layernorm.weight"),
    Tensor("query.kernel", "self_attn.q_proj.weight", MATRIX),
    Tensor("query_down.kernel", "self_attn.q_a_proj.weight", MATRIX),
    Tensor("query_norm.scale", "self_attn.q_a_layernorm.weight"),
    Tensor("query_up.kernel", "self_attn.q_b_proj.weight", MATRIX),
    Tensor("latent.kernel", "self_attn.kv_a_proj_with_mqa.weight", MATRIX),
    Tensor("latent_norm.scale", "self_attn.kv_a_layernorm.weight"),
    Tensor("expand.kernel", "self_attn.kv_b_proj.weight", MATRIX),
    Tensor("gate.kernel", "self_attn.g_proj.weight", MATRIX),
    Tensor("out.kernel", "self_attn.o_proj.weight", MATRIX),
)


def _moe(place: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """Experts, the router and the shared experts, in `place`; the three names are of an expert's matrices."""
    return (
        Tensor("norm.scale", "post_attention_layernorm.weight"),
        Tensor("router.kernel", f"{place}.gate.weight", MATRIX),
        Tensor("correction_bias", f"{place}.gate.e_score_correction_bias", dtype="float32"),
        Tensor("gate.kernel", f"{place}.experts.{{expert}}.{gate}.weight", MATRIX),
        Tensor("up.kernel", f"{place}.experts.{{expert}}.{up}.weight", MATRIX),
        Tensor("down.kernel", f"{place}.experts.{{expert}}.{down}.weight", MATRIX),
        Tensor("shared.gate.kernel", f"{place}.shared_experts.gate_proj.weight", MATRIX),
        Tensor("shared.up.kernel", f"{place}.shared_experts.up_proj.weight", MATRIX),
        Tensor("shared.down.kernel", f"{place}.shared_experts.down_proj.weight", MATRIX),
    )


MOE = _moe("mlp", "gate_proj", "up_proj", "down_proj")

KDA = (
    Tensor("norm.scale", "input_layernorm.weight"),
    Tensor("query.kernel", "self_attn.q_proj.weight", MATRIX),
    Tensor("key.kernel", "self_attn.k_proj.weight", MATRIX),
    Tensor("value.kernel", "self_attn.v_proj.weight", MATRIX),
    Tensor("query_conv.taps", "self_attn.q_conv1d.weight", (2, 0), rank=3),
    Tensor("key_conv.taps", "self_attn.k_conv1d.weight", (2, 0), rank=3),
    Tensor("value_conv.taps", "self_attn.v_conv1d.weight", (2, 0), rank=3),
    Tensor("decay_down.kernel", "self_attn.f_a_proj.weight", MATRIX),
    Tensor("decay_up.kernel", "self_attn.f_b_proj.weight", MATRIX),
    Tensor("decay_bias", "self_attn.dt_bias", dtype="float32"),
    Tensor("beta.kernel", "self_attn.b_proj.weight", MATRIX),
    Tensor("gate.kernel", "self_attn.g_proj.weight", MATRIX),
    Tensor("gate_down.kernel", "self_attn.g_a_proj.weight", MATRIX),
    Tensor("gate_up.kernel", "self_attn.g_b_proj.weight", MATRIX),
    Tensor("out_norm.scale", "self_attn.o_norm.weight"),
    Tensor("out.kernel", "self_attn.o_proj.weight", MATRIX),
)
RATE = Tensor("log_rate", "self_attn.A_log", (2,), rank=4, dtype="float32", loose=True)
PADDED_RATE = Tensor("log_rate", "self_attn.A_log", dtype="float32", multiple=128, loose=True)
"""Kimi Linear's and Kimi K3's, which is as long as a vector register is wide."""

FOUND_AS_MOE = tuple(dataclasses.replace(row, other=row.theirs.replace("mlp.", "block_sparse_moe.")) for row in SWIGLU)
"""Dense layers between layers of experts: transformers 5.23 writes them under the experts' name, and reads both."""

BLOCK_SPARSE_MOE = (
    *_moe("block_sparse_moe", "w1", "w3", "w2"),
    Tensor("latent_down.kernel", "block_sparse_moe.routed_expert_down_proj.weight", MATRIX),
    Tensor("latent_norm.scale", "block_sparse_moe.routed_expert_norm.weight"),
    Tensor("latent_up.kernel", "block_sparse_moe.routed_expert_up_proj.weight", MATRIX),
)

SITES = (
    Tensor("query", "res_proj.weight", (1,), rank=2),
    Tensor("key_scale", "res_norm.weight"),
)
"""AttnRes, under Kimi K3's names in every family: behind `layers.{layer}.self_attention_` and `layers.{layer}.mlp_` for
the two sites of a layer, behind `output_attn_` for the readout."""

UNREAD = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.mtp*")
"""Frequencies that old exports carry along, which follow from the settings, and modules of multi-token prediction."""

LLAMA = Table(
    whole=DECODER,
    sublayers={"gqa": GQA, "mla": MLA, "swiglu": SWIGLU, "moe": MOE},
    ignored=UNREAD,
)

KIMI_LINEAR = dataclasses.replace(
    LLAMA, sublayers={"kda": (*KDA, RATE), "mla": MLA, "swiglu": FOUND_AS_MOE, "moe": BLOCK_SPARSE_MOE}
)
KIMI_K3 = dataclasses.replace(
    KIMI_LINEAR,
    prefix="language_model.",
    sublayers={**KIMI_LINEAR.sublayers, "kda": (*KDA, PADDED_RATE)},
    ignored_outside=("vision_tower.*", "mm_projector.*"),
)

TABLES: dict[str, Table] = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA,
    "deepseek_v3": LLAMA,
    "kimi_linear": KIMI_LINEAR,
    "kimi_k3": KIMI_K3,
}
"""By `model_type`."""
