"""What can be set about a depth rule beside its name and block size."""

import dataclasses
import math

KINDS = {"query": ("learned", "input", "none"), "weights": ("softmax", "sigmoid")}
"""What the options that are words may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the depth rules; the defaults are the papers' own. Each rule says in `OPTIONS` which ones it has."""

    query: str = "learned"
    """Where the logits of a site come from. learned: its pseudo-query w. input: w + W x, x the newest source at unit
    RMS. none: a learned scalar for each source, whatever it holds."""
    weights: str = "softmax"
    """softmax over the sources, or the sigmoid of each logit by itself."""
    key_norm: bool = True
    """RMS-normalise the keys, with a learned gain. False: the source itself is the key."""
    heads: int = 1
    """Groups of channels, each with a softmax of its own."""
    window: int = 0
    """Besides the embedding a site reads its newest `window` sources; 0: all."""
    recency_bias: float = 0.0
    """Not 0: a learned scalar a site that starts here and is added to the logit of its newest source."""
    sum_sources: bool = False
    """Multiply what a site reads by the number of its sources. At zero queries that is the residual stream itself and
    not the stream over the number, which the eps of the following norm tells apart."""
    streams: int = 4
    """Parallel streams of hyper-connections."""


DEFAULTS = Options()


def check(options: Options, known: tuple[str, ...], rule: str) -> None:
    """Refuses options that a rule does not have, and values that no rule could use.

    Raises:
      ValueError: beginning with `option=value`, what is allowed after it.
    """
    for name, default in dataclasses.asdict(DEFAULTS).items():
        value = getattr(options, name)
        if value != default and name not in known:
            raise ValueError(f"{name}={value!r} is no option of {rule}; its options: {', '.join(known) or 'none'}")
        if name in KINDS and value not in KINDS[name]:
            raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(KINDS[name])}")
    for name, least in (("heads", 1), ("window", 0), ("streams", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)} must be at least {least}")
    if not math.isfinite(options.recency_bias):
        raise ValueError(f"recency_bias={options.recency_bias} must be finite")
    if options.query == "none" and not options.key_norm:
        raise ValueError("key_norm=False has no effect with query='none': there are no keys; set one of the two")
    if options.sum_sources and (options.weights == "sigmoid" or options.window):
        raise ValueError(
            "sum_sources=True needs weights='softmax' and window=0: weights that sum to 1 over all sources"
        )
    if options.query == "none" and options.heads > 1:
        raise ValueError(
            f"heads={options.heads} has no effect with query='none': there are no keys to divide; set heads=1"
        )
