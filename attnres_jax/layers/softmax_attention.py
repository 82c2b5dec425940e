"""Causal softmax attention, by the kernel that suits the devices.

splash    TPU: the blocked kernel that comes with JAX (jax.experimental.pallas.ops.tpu.splash_attention)
cudnn     NVIDIA GPU, in half precision: cuDNN's
xla       anywhere: XLA's own, and the only one that holds a score for each head and pair of tokens
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from attnres_jax.axes import mesh_axes_of, per_shard, platform
from attnres_jax.errors import ConfigError
from attnres_jax.layers.context import Context

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
BLOCKS = (512, 256, 128)  # tokens of a block of splash attention, which takes no fewer than the last
MAX_HEAD = 128  # channels of a head that cuDNN takes on every GPU


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G V"],
    context: Context,
    *,
    implementation: str,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """What every token reads of the tokens of its document up to itself.

    On a mesh each device has its own queries and heads, and of these the keys and values of all tokens.

    Args:
      query: of H heads.
      key: of G heads, each for H / G successive ones of the queries.
      value: as `key`; for xla and cudnn as wide as it, too.
      context: what the documents are.
      implementation: xla, cudnn or splash, which anything but a TPU interprets, slowly; see `implementation_for`.
      scale: of the scores; None: 1 / sqrt(K).
    """
    if implementation == "splash":
        scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        return _splash(scaled, key, value, context.segment_ids)
    mask = context.same_document
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, scale=scale, implementation=implementation
    )


def implementation_for(name: str, query: Float[Array, "B T H K"]) -> str:
    """`name`, or for `auto` what is fastest where the computation runs: on the devices of the mesh, if there is one.

    Raises:
      ConfigError: if it is a kernel that cannot run there, or not on such queries.
    """
    if name == "auto":
        return next((kernel for kernel in ("splash", "cudnn") if not _obstacle(kernel, query)), "xla")
    obstacle = _obstacle(name, query)
    if obstacle:
        raise ConfigError(f"model.attention={name!r} needs {obstacle}; nearest: 'auto'")
    return name


def _obstacle(name: str, query: Float[Array, "B T H K"]) -> str:
    """What a kernel lacks to run where the computation does; empty: nothing."""
    here, (_, length, _, width) = platform(), query.shape
    parts = _parts(mesh_axes_of(length=length).get("length", ()))
    if name == "splash":
        if here != "tpu":
            return f"a TPU, and this is a {here}"
        if length // parts % BLOCKS[-1]:
            return f"a multiple of {BLOCKS[-1]} tokens on a device, not {length // parts}"
    if name == "cudnn":
        if here != "gpu":
            return f"a GPU, and this is a {here}"
        if query.dtype != jnp.bfloat16:
            return f"model.dtype='bfloat16', not {query.dtype.name!r}"
        if width % 8 or width > MAX_HEAD:
            return f"heads of a multiple of 8 channels up to {MAX_HEAD}, not of {width}"
        if length % 2:  # where documents are packed
            return f"an even number of tokens, not {length}"
        if parts > 1:
            return f"all tokens of a row on one device, and mesh.context splits them over {parts}"
    return ""


def _splash(query, key, value, segment_ids: Int[Array, "B T"] | None):
    # Here, since it takes 0.15 s and TPUs alone need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    batch, length, heads, _ = query.shape
    documents = None if segment_ids is None else SegmentIds(segment_ids, segment_ids)
    axes = mesh_axes_of(batch=batch, length=length, heads=heads)
    if not axes:
        return _on_one_device(_kernel(length, 1), query, key, value, documents)
    rows, tokens, by_head = axes["batch"], axes["length"], axes["heads"]
    kernel = _kernel(length, _parts(tokens))
    mesh = jax.sharding.get_abstract_mesh()
    mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # forgets that a pipeline's stages may be manual
    own_rows_of_mask = NamedSharding(mesh, P(None, tokens))
    own, whole = P(rows, tokens, by_head, None), P(rows, None, by_head, None)
    by_document = P() if documents is None else SegmentIds(P(rows, tokens), P(rows, None))
    specs = (kernel.manual_sharding_spec(own_rows_of_mask), own, whole, whole, by_document)
    return per_shard(_on_one_device, specs, own)(kernel, query, key, value, documents)


def _on_one_device(kernel, query, key, value, documents):
    by_head = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.vmap(kernel)(*by_head, documents).swapaxes(1, 2)


def _kernel(length: int, parts: int):
    """Splash attention over so many tokens, cut into parts by the query."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in BLOCKS if length // parts % size == 0)
    mask = splash.MultiHeadMask([splash.CausalMask((length, length), shard_count=parts)])  # of every head
    sizes, interpret = splash.BlockSizes(*(block,) * 8), platform() != "tpu"
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=parts, interpret=interpret)


def _parts(axes: tuple[str, ...]) -> int:
    """Over how many devices these mesh axes go."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes)
