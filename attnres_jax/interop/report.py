"""What the command line prints: a directory's contents, and how far two models are apart."""

import math
from collections import Counter
from pathlib import Path

from attnres_jax.interop.checkpoint import abstract_model, open_checkpoint
from attnres_jax.interop.convert import Verification
from attnres_jax.interop.hub import local_directory
from attnres_jax.models import named_leaves


def inspect_text(name: Path | str) -> str:
    """A directory in a few lines; nothing is read but what `open_checkpoint` reads.

    Raises:
      InteropError: if it could not be loaded.
    """
    directory = local_directory(name)
    family, config, _, store, bindings = open_checkpoint(directory)
    leaves = named_leaves(abstract_model(config))
    dtypes = Counter()
    for entry in store.entries.values():
        dtypes[entry.dtype] += math.prod(entry.shape)
    depth = config.depth
    blocks = f"{depth.block_size // 2} layers a block, " * (depth.rule != "residual")
    lines = [
        f"{directory}: {family.model_type}, {sum(math.prod(leaf.shape) for leaf in leaves.values()):,} parameters",
        f"depth rule: {depth.rule}, {blocks}{config.num_layers} layers of width {config.width}",
        f"tensors: {len(store.entries)} in {len(set(store.files.values()))} files, all accounted for; "
        + ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.most_common()),
        "",
    ]
    first = {binding.ours: binding.theirs for binding in reversed(bindings)}
    rows = [("parameter", "shape", "first tensor")]
    rows += [(name, " x ".join(map(str, leaf.shape)), first[name]) for name, leaf in leaves.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def verification_text(found: Verification) -> str:
    """The differences by layer, then the verdict."""
    lines = ["layer  relative difference  largest"]
    rows = zip(found.layers, found.largest, strict=True)
    lines += [f"{layer:5}  {relative:19.1e}  {largest:7.1e}" for layer, (relative, largest) in enumerate(rows)]
    lines += [
        f"logits: relative {found.logits:.1e}, largest {found.largest_logit:.1e}, over {found.tokens} tokens (float32)",
        f"cause: {found.cause}",
        "the same function" if found.same else "NOT the same function within 1e-4",
    ]
    return "\n".join(lines)
