"""Loading and saving checkpoint directories: `config.json` and sharded safetensors, under Hugging Face names."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from tqdm import tqdm

from attnres_jax.config import DepthConfig, ModelConfig, validate_model
from attnres_jax.errors import ConfigError
from attnres_jax.interop.binding import Binding, bind, embedding_name, fit, tied_head
from attnres_jax.interop.checkpoint import abstract_model, open_checkpoint
from attnres_jax.interop.config_json import config_json_of, read_config_json, write_config_json
from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.hub import copy_companions, local_directory
from attnres_jax.interop.output import new_directory
from attnres_jax.interop.store import STORED, TensorStore, write_tensors
from attnres_jax.interop.tables import TABLES
from attnres_jax.models import Decoder, default_block_size, named_leaves
from attnres_jax.parallel import parameter_sharding

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def load_pretrained(
    directory_or_repo_id: Path | str,
    residual: str | DepthConfig | None = None,
    mesh: Mesh | None = None,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
    progress: bool = False,
) -> Decoder:
    """Loads a model: `load_pretrained(directory)(tokens) -> logits`.

    Each parameter is read when its turn comes, and of it only what this process's devices hold, so that no host has the
    whole model in memory.

    Args:
      directory_or_repo_id: a directory with `config.json` and safetensors, or a repository of the hub.
      residual: the depth rule for a checkpoint of the plain residual, by name (then with about eight blocks) or with
        all its options. Its parameters are new, and at their start it is the same function where `docs/semantics.md`
        says so, as for block and full; another for rezero, layerscale, rms_block and delta rules. None: as
        `config.json` says.
      mesh: from `parallel.make_mesh`, where every parameter goes as in training; or of any other axes: every
        parameter is spread along its largest axis that the devices divide. None: the first device.
      dtype: of activations, float32 or bfloat16; None: as `config.json` says.
      param_dtype: of parameters; None: as stored, which exports to the same bytes. For fine-tuning: float32.
      sharding: from a parameter's name and shape to where it goes, in the place of `mesh`.
      progress: shows a bar.

    Raises:
      InteropError: one line, for whatever is missing, extra, misshapen, damaged or not supported.
    """
    directory = local_directory(directory_or_repo_id)
    _, stored_config, _, store, bindings = open_checkpoint(directory)
    config = dataclasses.replace(stored_config, dtype=dtype or stored_config.dtype)
    if residual is not None:
        config = with_rule(config, residual, directory)
    _check(config, param_dtype)
    shapes = abstract_model(config)
    leaves = named_leaves(shapes)
    if sharding is None:
        sharding = partial(parameter_sharding, mesh) if mesh else _first_device
    by_parameter: dict[str, list[Binding]] = {}
    for binding in bindings:
        by_parameter.setdefault(binding.ours, []).append(binding)
    arrays = {}
    with tqdm(total=len(bindings), desc=f"loading {directory.name}", unit="tensor", disable=not progress) as bar:
        for name, own in by_parameter.items():
            shape, kept = leaves[name].shape, _held_dtype(store, own, param_dtype)
            part = _reader(store, own, shape, kept)
            arrays[name] = jax.make_array_from_callback(shape, sharding(name, shape), part)
            bar.update(len(own))
    if stored_config.depth.rule != config.depth.rule:
        sites = named_leaves({"sites": shapes.rule().init_sites(len(shapes.plan()), config.width)})
        kept = arrays["embedding.table"].dtype
        arrays |= {name: jax.device_put(x.astype(kept), sharding(name, x.shape)) for name, x in sites.items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in leaves])


def pretrained_config(directory_or_repo_id: Path | str, residual: str | DepthConfig | None = None) -> ModelConfig:
    """What `load_pretrained` with these arguments would load, by `config.json` alone: arguments and errors as there."""
    directory = local_directory(directory_or_repo_id)
    _, config, _ = read_config_json(directory)
    return config if residual is None else with_rule(config, residual, directory)


def save_pretrained(
    model: Decoder,
    directory: Path | str,
    *,
    like: Path | str | None = None,
    quantised: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
    write_more: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Writes `config.json` and safetensors; the directory appears whole or not at all.

    Args:
      model: of one of `FAMILIES`, under `residual` or `block`.
      directory: new or empty.
      like: the directory that the model was loaded from: its dtypes, its tokenizer and the settings that no model
        config holds are kept. Tensors that were quantised there are written as bfloat16, unless `quantised`.
      quantised: tensors that are quantised in `like` are again, in its format: the same bytes where nothing has
        changed, the nearest numbers elsewhere, which of a trained model are not quite the same.
      dtype: of the tensors, in the place of the parameters' own and of those in `like`, but for quantised ones and
        those that a format keeps in float32. `config.json` says it too, so that activations have it after loading.
      max_shard_bytes: size of a file.
      progress: shows a bar.
      write_more: called with the directory before it is complete, to put further files into it.

    Raises:
      InteropError: if the format has no place for the model, or the directory is in use.
    """
    like = None if like is None else local_directory(like)
    _check(model.config, dtype)
    family, values = config_json_of(model.config, like, quantised, dtype)
    leaves = named_leaves(model)
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves.values()):
        raise InteropError("parameters are spread over several processes; gather them before saving")
    store = None if like is None else TensorStore(like)
    there = store.entries if store else {}
    if quantised and not (store and store.quantised):
        raise InteropError("quantised=True needs like=DIRECTORY, of a checkpoint with quantised tensors")
    table = TABLES[family.model_type]
    rows = fit(bind(table, leaves, model.plan()), there)
    if head := tied_head(table, rows, there):  # stored there beside the embedding: the same bytes again
        rows += [row._replace(theirs=head) for row in rows if row.theirs == embedding_name(rows)]
    bindings, dtypes = {row.theirs: row for row in rows}, {}
    for name, binding in bindings.items():
        said = binding.dtype or dtype
        own = DTYPES[said] if said else np.dtype(leaves[binding.ours].dtype)
        kept = name in there and (binding.dtype or not dtype)
        dtypes[name] = there[name].dtype if kept else STORED[own]
    sizes = {name: math.prod(b.shape) * _numpy(dtypes[name]).itemsize for name, b in bindings.items()}
    part = _parts(leaves)

    def plain(name: str) -> np.ndarray:
        return to_theirs(part(bindings[name]), bindings[name])

    of_two = {}  # from either part of a quantised tensor to the tensor
    if quantised:
        of_two = {half: name for name in bindings if name in store.quantised for half in store.quantised[name][:2]}
        stored = {half: store.stored[half].end - store.stored[half].begin for half in of_two}
        sizes = {name: size for name, size in sizes.items() if name not in store.quantised} | stored
    halves: dict[str, np.ndarray] = {}

    def make(name: str) -> np.ndarray:
        if name not in of_two:
            return plain(name).astype(_numpy(dtypes[name]))
        if name not in halves:
            halves.update(store.quantise(of_two[name], plain(of_two[name])))
        return halves.pop(name)

    with new_directory(Path(directory)) as temporary:
        write_config_json(temporary, values)
        if like is not None:
            copy_companions(like, temporary)
        write_more(temporary)
        shown = lambda names: tqdm(names, desc="saving", unit="tensor", disable=not progress)  # noqa: E731
        write_tensors(temporary, sizes, make, max_shard_bytes=max_shard_bytes, progress=shown)


def with_rule(config: ModelConfig, residual: str | DepthConfig, where: Any) -> ModelConfig:
    """The model of a residual checkpoint under another depth rule.

    Raises:
      InteropError: if the checkpoint is not of the plain residual, or the rule impossible.
    """
    if residual == config.depth.rule:
        return config
    if isinstance(residual, str):
        sums = residual in ("block", "full")  # the stream itself at zero queries, whatever the norms' eps
        residual = DepthConfig(rule=residual, block_size=default_block_size(config.num_layers), sum_sources=sums)
    if config.depth.rule != "residual" and residual != config.depth:
        raise InteropError(
            f"{where} has depth weights of its own (rule {config.depth.rule!r}, block_size={config.depth.block_size}); "
            f"under {residual.rule!r} it would be another function"
        )
    config = dataclasses.replace(config, depth=residual)
    _check(config, None)
    return config


def to_theirs(part: np.ndarray, binding: Binding) -> np.ndarray:
    """Part of a parameter in the layout of its tensor."""
    order = np.argsort(binding.axes)
    part = part.transpose(order)
    stored = [binding.shape[axis] for axis in sorted(binding.axes)]
    part = np.pad(part, [(0, there - here) for there, here in zip(stored, part.shape, strict=True)])
    return part.reshape(binding.shape)


def _reader(store: TensorStore, bindings: Sequence[Binding], shape: tuple[int, ...], dtype: np.dtype) -> Callable:
    """A function from an index into a parameter to that part of it, read from its tensors."""
    by_place = {binding.index: binding for binding in bindings}
    leading = len(bindings[0].index)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(size)[at] for at, size in zip(index, shape, strict=True)]
        out = np.empty([len(r) for r in ranges], dtype)
        for place in np.ndindex(*(len(r) for r in ranges[:leading])):
            binding = by_place[tuple(r[i] for r, i in zip(ranges[:leading], place, strict=True))]
            at = [slice(0, 1)] * len(binding.shape)
            for r, axis in zip(ranges[leading:], binding.axes, strict=True):
                at[axis] = slice(r.start, r.stop)
            rest = [axis for axis in range(len(at)) if axis not in binding.axes]
            stored = store.read(binding.theirs, tuple(at)).transpose(*binding.axes, *rest)
            out[place] = stored.reshape(out.shape[leading:])
        return out

    return part


def _parts(leaves: Mapping[str, Any]) -> Callable[[Binding], np.ndarray]:
    """A function from a binding to the part of its parameter, which fetches a sublayer's stack of experts once."""
    held: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def part(binding: Binding) -> np.ndarray:
        key = (binding.ours, binding.index[:1])
        if key not in held:
            held.clear()
            held[key] = np.asarray(leaves[binding.ours][binding.index[:1]])
        return held[key][binding.index[1:]]

    return part


def _held_dtype(store: TensorStore, bindings: Sequence[Binding], param_dtype: str | None) -> np.dtype:
    """Of a parameter: what its row or the caller says, else the one its tensors have."""
    said = bindings[0].dtype or param_dtype
    if said:
        return DTYPES[said]
    return np.dtype(jax.numpy.result_type(*{store.dtype(binding.theirs) for binding in bindings}))


def _check(config: ModelConfig, param_dtype: str | None) -> None:
    """Refuses a model that cannot be built, and parameters of an unknown dtype."""
    try:
        validate_model(config)
    except ConfigError as error:
        raise InteropError(str(error)) from None
    if param_dtype not in (None, *DTYPES):
        raise InteropError(f"param_dtype={param_dtype!r} is unknown; known: {', '.join(DTYPES)}")


def _first_device(name: str, shape: tuple[int, ...]) -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _numpy(stored: str) -> np.dtype:
    return next(dtype for dtype, name in STORED.items() if name == stored)
