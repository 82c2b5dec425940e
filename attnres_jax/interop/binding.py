"""From a table to the tensors of one model: what is read from where, checked both ways before a byte is read."""

import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.headers import Entry
from attnres_jax.interop.tables import EMBEDDING, HEAD, SITES, Table, Tensor


class Binding(NamedTuple):
    """One tensor there, and the part of one parameter here that it holds."""

    theirs: str
    ours: str
    index: tuple[int, ...]
    """Place on the parameter's leading axes: sublayer of its kind (or site), then expert."""
    axes: tuple[int, ...]
    """Axis i of that part is axis `axes[i]` there."""
    shape: tuple[int, ...]
    """There."""
    size: int
    """How many numbers it holds; with zeros at the end it may be longer."""
    dtype: str | None
    """As in `Tensor`, like the next two."""
    other: str = ""
    loose: bool = False


def bind(table: Table, shapes: Mapping[str, Any], plan: Sequence[str]) -> list[Binding]:
    """All tensors of a model, in layer order.

    Args:
      table: of the family.
      shapes: anything with a shape for each parameter by dotted name.
      plan: the kind of every sublayer.

    Raises:
      InteropError: if a parameter has no name in the table.
    """
    bindings = list(_bindings(table, shapes, plan))
    covered = dict.fromkeys(shapes, 0)
    for binding in bindings:
        covered[binding.ours] += binding.size
    for name, count in covered.items():
        if count != math.prod(shapes[name].shape):
            raise InteropError(f"parameter {name!r} has no name in this format")
    return bindings


def _bindings(table: Table, shapes: Mapping[str, Any], plan: Sequence[str]) -> Iterator[Binding]:
    first, last = table.whole[:1], table.whole[1:]
    yield from _rows(first, table.prefix, "", shapes, ())
    seen: dict[str, int] = {}
    for number, kind in enumerate(plan):
        slot = seen[kind] = seen.get(kind, -1) + 1
        layer = f"{table.prefix}model.layers.{number // 2}."
        if kind not in table.sublayers:
            raise InteropError(f"sublayers of kind {kind!r} have no names in this format")
        yield from _rows(table.sublayers[kind], layer, f"sublayers.{kind}.", shapes, (slot,))
        yield from _rows(SITES, layer + ("mlp_", "self_attention_")[number % 2 == 0], "sites.", shapes, (number,))
    yield from _rows(SITES, f"{table.prefix}model.output_attn_", "sites.", shapes, (len(plan),))
    yield from _rows(last, table.prefix, "", shapes, ())


def _rows(rows: Sequence[Tensor], theirs: str, ours: str, shapes, index: tuple[int, ...]) -> Iterator[Binding]:
    for row in rows:
        name = ours + row.ours
        if name not in shapes:
            continue
        shape = shapes[name].shape
        experts = range(shape[len(index)]) if "{expert}" in row.theirs else (None,)
        for expert in experts:
            own = index if expert is None else (*index, expert)
            part = shape[len(own) :]
            axes = row.axes or tuple(range(len(part)))
            stored = [1] * (row.rank or len(axes))
            for size, axis in zip(part, axes, strict=True):
                stored[axis] = size
            stored[0] += -stored[0] % row.multiple
            full_name = theirs + row.theirs.replace("{expert}", str(expert))
            other = theirs + row.other if row.other else ""
            yield Binding(full_name, name, own, axes, tuple(stored), math.prod(part), row.dtype, other, row.loose)


def fit(bindings: Sequence[Binding], stored: Mapping[str, Entry]) -> list[Binding]:
    """The bindings under the names and shapes that a directory has, where the format leaves these open."""
    return [_fit(binding, stored) for binding in bindings]


def _fit(binding: Binding, stored: Mapping[str, Entry]) -> Binding:
    if binding.theirs not in stored and binding.other in stored:
        binding = binding._replace(theirs=binding.other)
    if not binding.loose or binding.theirs not in stored:
        return binding
    shape = stored[binding.theirs].shape
    longest = max(range(len(shape)), key=shape.__getitem__, default=0)
    if shape and binding.size <= shape[longest] == math.prod(shape):
        return binding._replace(axes=(longest,), shape=shape)
    return binding


def check(
    table: Table, bindings: Sequence[Binding], stored: Mapping[str, Entry], where: Any, num_further: int = 0
) -> None:
    """Holds what a directory has to what the model needs.

    A tied model may have its head stored too; the caller compares the two. `num_further` layers behind the last one may
    be there, which are not read.

    Raises:
      InteropError: one line with the first tensors that are missing, of another shape, or in nobody's use.
    """
    wanted = {binding.theirs: binding for binding in bindings}
    num_layers = 1 + max(
        int(name.split("model.layers.")[1].split(".")[0]) for name in wanted if "model.layers." in name
    )
    further = [f"model.layers.{layer}.*" for layer in range(num_layers, num_layers + num_further)]
    ignored = [table.prefix + pattern for pattern in (*table.ignored, *further)]
    ignored += table.ignored_outside
    if tied_head(table, bindings, stored):
        ignored.append(tied_head(table, bindings, stored))
    extra = [
        name
        for name in stored
        if name not in wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    ]
    missing = [name for name in wanted if name not in stored]
    shapes = [
        f"{name} {list(stored[name].shape)} instead of {list(binding.shape)}"
        for name, binding in wanted.items()
        if name in stored and stored[name].shape != binding.shape
    ]
    problems = [("missing", missing), ("of another shape", shapes), ("not part of such a model", extra)]
    found = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems if names)
    if found:
        raise InteropError(f"the tensors of {where} do not fit its config.json: {found}")


def tied_head(table: Table, bindings: Sequence[Binding], stored: Mapping[str, Entry]) -> str | None:
    """The name of a stored head that the model takes from its embedding."""
    if any(binding.ours == HEAD for binding in bindings):
        return None
    name = next((table.prefix + row.theirs for row in table.whole if row.ours == HEAD), None)
    return name if name in stored else None


def embedding_name(bindings: Sequence[Binding]) -> str:
    """The tensor of the embedding: its dtype is the checkpoint's."""
    return next(binding.theirs for binding in bindings if binding.ours == EMBEDDING)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(itertools.islice(names, 3))
    return shown + (", ..." if len(names) > 3 else "")
