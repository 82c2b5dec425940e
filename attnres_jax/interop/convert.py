"""Residual checkpoints into AttnRes without loss, and the proof: the same function, layer by layer.

With zero queries a site gives its sources equal weights. These sum to the residual stream, so that what the site reads
is the stream over their number K, or, with `sum_sources`, the stream itself. The norm behind the site takes K away up
to its eps, which acts on a mean square that is K^2 smaller; with `sum_sources` nothing is left but rounding.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from attnres_jax.config import DepthConfig
from attnres_jax.interop.binding import bind, embedding_name
from attnres_jax.interop.checkpoint import abstract_model, open_checkpoint
from attnres_jax.interop.config_json import with_depth, write_config_json
from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.hub import copy_companions, local_directory
from attnres_jax.interop.output import new_directory
from attnres_jax.interop.pretrained import load_pretrained
from attnres_jax.interop.store import SINGLE, TensorStore, shard_names, write_file, write_index
from attnres_jax.interop.tables import TABLES
from attnres_jax.models import Decoder, default_block_size, named_leaves, unrolled

NEW_FILE = "model-attention-residuals.safetensors"
START = {"sites.query": np.zeros, "sites.key_scale": np.ones}
ROUNDING = 2e-5
"""Relative difference of float32 logits that the order of summation explains."""


def convert(
    source: Path | str,
    target: Path | str,
    *,
    residual: str = "block",
    layers_per_block: int = 0,
    sum_sources: bool = True,
    progress: bool = False,
) -> None:
    """Writes `target`: the tensors of `source` byte for byte, and zero queries and unit key scales beside them.

    Args:
      source: a directory or repository of a residual model.
      target: new or empty.
      residual: the depth rule, which has to be one that the format can say: block.
      layers_per_block: transformer layers in a block; 0: for about eight blocks.
      sum_sources: say so in `config.json` (`attn_res_sum`), which makes the function the same to rounding. Readers that
        do not know the key compute the stream over the number of sources, which differs by the norms' eps alone.
      progress: shows a bar.

    Raises:
      InteropError: if the source is not sound or not residual, or the rule not one of the format.
    """
    directory = local_directory(source)
    family, config, values, store, old = open_checkpoint(directory)
    if config.depth.rule != "residual":
        raise InteropError(f"{directory} is an AttnRes model already: attn_res_block_size is not null")
    if residual != "block":
        raise InteropError(
            f"residual={residual!r}: a checkpoint counts the layers of a block (attn_res_block_size), so it can be "
            "'block' alone; in memory, load_pretrained(directory, residual=...) takes any rule"
        )
    if not 0 <= layers_per_block <= config.num_layers:
        raise InteropError(
            f"layers_per_block={layers_per_block} is not one of 1 to {config.num_layers}, or 0 for about eight blocks; "
            f"nearest: layers_per_block={config.num_layers if layers_per_block > 0 else 1}"
        )
    size = 2 * layers_per_block or default_block_size(config.num_layers)
    depth = DepthConfig(rule=residual, block_size=size, sum_sources=sum_sources)
    config = dataclasses.replace(config, depth=depth)
    shapes = abstract_model(config)
    sites = [b for b in bind(TABLES[family.model_type], named_leaves(shapes), shapes.plan()) if b.ours in START]
    new = {b.theirs: START[b.ours](b.shape, store.dtype(embedding_name(old))) for b in sites}
    with new_directory(Path(target)) as temporary:
        write_config_json(temporary, with_depth(family, values, config))
        copy_companions(directory, temporary)
        _copy_weights(store, temporary, new, progress)


def _copy_weights(store: TensorStore, target: Path, new: dict[str, np.ndarray], progress: bool) -> None:
    """The files as they are, under names that have room for one more, and that one."""
    files = sorted(set(store.files.values()))
    renamed = {SINGLE: shard_names(2)[0]} if files == [SINGLE] else dict(zip(files, files, strict=True))
    added = shard_names(2)[1] if files == [SINGLE] else NEW_FILE
    sizes = {file: os.path.getsize(store.directory / file) for file in files}
    with tqdm(total=sum(sizes.values()), desc="copying", unit="B", unit_scale=True, disable=not progress) as bar:
        for file in files:
            shutil.copyfile(store.directory / file, target / renamed[file])
            bar.update(sizes[file])
    write_file(target / added, new)
    file_of = {name: renamed[file] for name, file in store.files.items()} | dict.fromkeys(new, added)
    total = sum(entry.end - entry.begin for entry in store.stored.values()) + sum(x.nbytes for x in new.values())
    write_index(target, file_of, total)


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far two models are apart on the same tokens, in float32."""

    layers: Float[np.ndarray, "layers"]
    """Of each transformer layer, the larger relative difference (Euclidean norms) of its two sublayers' outputs."""
    largest: Float[np.ndarray, "layers"]
    """Of each transformer layer, the largest absolute difference of a number in its two sublayers' outputs."""
    logits: float
    """Relative difference of the logits."""
    largest_logit: float
    """Largest absolute difference of a logit."""
    cause: str
    """What explains the difference."""
    tokens: int
    """Compared: padding is not."""

    @property
    def same(self) -> bool:
        """Whether the second is the first within 1e-4, for a reason that is known."""
        return self.logits < 1e-4 and not self.cause.startswith("unknown")


def verify(
    original: Decoder,
    converted: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    positions: Int[Array | np.ndarray, "B T"] | None = None,
) -> Verification:
    """Compares two models on a batch, each as a plain loop over its sublayers with float32 arithmetic.

    Raises:
      InteropError: if they cannot be compared.
    """
    pairs = {
        name: (getattr(original.config, name), getattr(converted.config, name))
        for name in ("num_layers", "width", "vocab_size")
    }
    differing = ", ".join(f"{name} ({a} and {b})" for name, (a, b) in pairs.items() if a != b)
    if differing:
        raise InteropError(f"the models differ in {differing}: they are not one model under two rules")
    batch = (tokens, segment_ids, positions)
    left, right = (_run(model, *batch) for model in (original, converted))
    sublayers = np.array([_relative(b, a) for a, b in zip(left[0], right[0], strict=True)])
    largest = np.abs(right[0] - left[0]).max(axis=tuple(range(1, left[0].ndim)))
    logits = _relative(right[1], left[1])
    return Verification(
        layers=sublayers.reshape(-1, 2).max(1),
        largest=largest.reshape(-1, 2).max(1),
        logits=logits,
        largest_logit=float(np.abs(right[1] - left[1]).max()),
        cause=_cause(original, converted, batch, logits),
        tokens=len(left[1]),
    )


def _cause(original: Decoder, converted: Decoder, batch, difference: float) -> str:
    if difference == 0:
        return "none: the two are bitwise equal"
    before, after = named_leaves(original), named_leaves(converted)
    changed = [name for name, x in before.items() if name in after and not np.array_equal(x, after[name])]
    if changed:
        return (
            f"other weights: {len(changed)} of {len(before)} arrays differ, {changed[0]} among them; "
            "the model has been trained since it was converted, or was not converted from this one"
        )
    query = after.get("sites.query")
    if query is not None and float(jnp.abs(query.astype(jnp.float32)).max()) > 0:
        return "the queries are not zero: the model has been trained since it was converted"
    left, right = (_run(with_eps(model, 1e-30), *batch)[1] for model in (original, converted))
    without = _relative(right, left)
    if without < difference / 5:
        return (
            "the eps of the norms, which acts on the mean of K sources, K^2 smaller in mean square than their sum: "
            f"without it {without:.1e} is left"
        )
    if difference < ROUNDING:
        return "rounding: float32 sums in another order"
    return f"unknown: not the norms' eps, without which {without:.1e} is left"


def with_eps(model: Decoder, eps: float) -> Decoder:
    """The model with another eps in its norms, and float32 activations."""
    config = dataclasses.replace(model.config, norm_eps=eps, dtype="float32")
    return with_config(model, config)


def with_config(model: Decoder, config) -> Decoder:
    """The parameters of a model under another configuration."""
    return jax.tree.unflatten(jax.tree.structure(abstract_model(config)), jax.tree.leaves(model))


def _run(model: Decoder, tokens, segment_ids, positions) -> tuple[np.ndarray, np.ndarray]:
    """(outputs of all sublayers, logits) at real tokens, float32."""
    trace = _trace(
        with_config(model, dataclasses.replace(model.config, dtype="float32")), tokens, segment_ids, positions
    )
    real = np.ones(np.shape(tokens), bool) if segment_ids is None else np.asarray(segment_ids) > 0
    return np.asarray(trace.outputs)[:, real], np.asarray(trace.logits)[real]


_trace = jax.jit(unrolled)


def _relative(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


def load_pair(original: Path | str, converted: Path | str, progress: bool = False) -> tuple[Decoder, Decoder]:
    """Both models with float32 activations."""
    return tuple(load_pretrained(name, dtype="float32", progress=progress) for name in (original, converted))
