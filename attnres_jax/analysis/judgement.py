"""Judgement: what a difference between two arms is worth, held against the spread of their seeds."""

import dataclasses
import math

from attnres_jax.analysis.arms import Arm, warnings
from attnres_jax.analysis.runs import Run


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What is known of the difference of one arm to another."""

    brief: str
    """The claim in a few words, its subject being the second arm: `lower by 0.0287, outside the spread of seeds`."""
    sentence: str
    """The claim with the numbers that it rests on."""


def judge(first: Arm, second: Arm, *, by_token: bool = True) -> Judgement:
    """Judges how `second` differs from `first` in final held-out loss.

    The spread of seeds is a standard deviation to either side of the mean: a difference is inside it when the two
    intervals meet. Seeds that both arms have are compared one by one too, since a seed fixes the order of the data.

    Args:
      first: the arm held against.
      second: the arm judged.
      by_token: False compares bits per byte, for arms whose tokens are not the same pieces of text.
    """
    judgement = _judge(first, second, by_token)
    if any(line.startswith("Different") for line in warnings([*first.runs, *second.runs])):
        unlike = "They were not trained alike: see the warning."
        return Judgement(f"{judgement.brief}, not trained alike", f"{judgement.sentence} {unlike}")
    return judgement


def _judge(first: Arm, second: Arm, by_token: bool) -> Judgement:
    read = Run.final_loss.fget if by_token else Run.final_bits_per_byte.fget
    a, b = first.by_seed(read), second.by_seed(read)
    for arm, values in ((first, a), (second, b)):
        if not all(map(math.isfinite, values.values())):
            lost = f"{arm.label} did not end with a finite held-out loss: nothing to compare with it."
            return Judgement("not comparable", lost)
    difference = second.mean(read) - first.mean(read)
    if difference == 0:
        return Judgement("exactly equal", f"{second.label} and {first.label} are exactly equal.")
    direction = "lower" if difference < 0 else "higher"
    by = f"by {_digits(difference)}{'' if by_token else ' bits/byte'}"
    claim = f"{second.label} is {direction} than {first.label} {by} ({100 * abs(difference / first.mean(read)):.2f} %)"
    spreads = {arm: arm.spread(read) for arm in (first, second) if len(arm.seeds) > 1}
    if not spreads:
        unknown = "n = 1: the spread of seeds is unknown, so this is one observation."
        return Judgement(f"{direction} {by} in one observation", f"{claim}; {unknown}")
    side = "inside" if abs(difference) <= sum(spreads.values()) else "outside"
    told = " and ".join(f"± {_digits(spread)} for n = {len(arm.seeds)}" for arm, spread in spreads.items())
    place = f"{side} the spread of seeds ({told})"
    brief = f"{direction} {by}, {side} the spread of seeds"
    if len(spreads) == 1:
        single = first if second in spreads else second
        return Judgement(
            f"{brief} of one arm", f"{claim}: {place}, but {single.label} has n = 1, so this is one observation."
        )
    paired = [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]
    agreeing = [value for value in paired if value * difference > 0]
    if len(paired) < 2:
        return Judgement(brief, f"{claim}: {place}.")
    if len(agreeing) < len(paired):
        seeds = f"in {len(agreeing)} of {len(paired)} shared seeds"
        return Judgement(f"{brief} and {direction} {seeds}", f"{claim} on average and {direction} {seeds}: {place}.")
    sizes = f"by {_digits(min(agreeing, key=abs))} to {_digits(max(agreeing, key=abs))}"
    chance = f"equal arms would agree so 1 time in {2 ** (len(paired) - 1)}"
    every = f"{direction} in every one of {len(paired)} seeds"
    return Judgement(f"{brief} and {every}", f"{claim} on average and {every}, {sizes}: {place}; {chance}.")


def _digits(value: float) -> str:
    return f"{abs(value):.4f}" if abs(value) >= 0.001 else f"{abs(value):.2g}"
