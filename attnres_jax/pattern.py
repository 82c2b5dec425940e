"""Layer patterns: which kind of sublayer stands in which transformer layer, as one short text."""

import itertools
from collections.abc import Sequence


def expand(pattern: str, num_layers: int, known: Sequence[str]) -> list[str]:
    """The kind in every layer.

    Kinds are separated by commas, `kda*3` stands for three of them, and the whole is repeated until the layers are
    full: `kda*3,mla` is KDA, KDA, KDA, MLA, KDA, ... A last `moe*` fills the rest and nothing is repeated:
    `swiglu,moe*` is one dense layer and then experts.

    Raises:
      ValueError: saying what of the pattern is not one.
    """
    kinds: list[str] = []
    items = [item.strip() for item in pattern.split(",")]
    for i, item in enumerate(items):
        kind, star, times = (part.strip() for part in item.partition("*"))
        if kind not in known:
            raise ValueError(f"{kind!r} is unknown; known: {', '.join(known)}")
        if star and not times:
            if i < len(items) - 1:
                raise ValueError(f"{item!r} fills the rest and can only come last")
            return (kinds + [kind] * num_layers)[:num_layers]
        if star and not (times.isdecimal() and int(times)):
            raise ValueError(f"{item!r} must end in a positive number")
        kinds += [kind] * (int(times) if star else 1)
    return list(itertools.islice(itertools.cycle(kinds), num_layers))


def shorten(kinds: Sequence[str]) -> str:
    """The shortest pattern of these layers."""
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]
    filled = ",".join([*(_item(*run) for run in runs[:-1]), f"{runs[-1][0]}*"])
    texts = [runs[0][0] if len(runs) == 1 else filled]
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            texts.append(",".join(_item(kind, len(list(run))) for kind, run in itertools.groupby(kinds[:period])))
            break
    return min(texts, key=len)


def _item(kind: str, times: int) -> str:
    return kind if times == 1 else f"{kind}*{times}"
