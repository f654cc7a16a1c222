"""Agreement: does a block do the same in both arms, up to what another seed changes anyway?

Every line of evidence is a figure of each block that is 0 where arms agree: D (within arms less
between them) of similarity or of damage, and the difference of what probes read. With its margin
each is a test, and two claims are made of all of them, Holm over the blocks:

- `agnostic`: every line is within its margin (intersection-union);
- `specific`: strange blocks do harm (one of the causal lines is beyond its margin), and something
  else is different (one of the others is). Neither alone will do: what differs may not matter, and
  what harms may be a matter of fitting.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from melprobe.analysis.agreement import Differences
from melprobe.analysis.claims import (
    AllOf,
    EitherOf,
    InMargins,
    LayerClaim,
    Testable,
    TwoSided,
    claims,
)

CAUSAL = ("exchanged", "stitched")
Agreement = Literal[
    "agnostic",
    "specific",
    "undecided",
    "undecided: seeds",
    "undecided: nearest WER",
    "undecided: gate",
]


class LayerAgreement(NamedTuple):
    """What is said of a block of a pair."""

    agreement: Agreement
    together: LayerClaim
    """of all lines, each in units of its own margin"""
    lines: dict[str, LayerClaim]
    """of each line by itself: below its margin (alike), above, or undecided"""


def agreements(
    lines: Mapping[str, Differences], margins: Mapping[str, float]
) -> list[LayerAgreement]:
    """Of each of L blocks. lines: D of each, and of `probe` the difference of means; margins: of

    each.
    """
    tests: dict[str, Testable] = {**lines, "probe": TwoSided(lines["probe"])}
    scaled = {name: InMargins(test, margins[name]) for name, test in tests.items()}
    kinds = [
        EitherOf([test for name, test in scaled.items() if (name in CAUSAL) == causal])
        for causal in (True, False)
    ]
    by_line = {name: claims(test, margins[name]) for name, test in tests.items()}
    enough = all(one.enough for one in lines.values())
    found = []
    for layer, together in enumerate(claims(AllOf(kinds), 1.0)):
        label: Agreement = "undecided" if enough else "undecided: seeds"
        if together.claim == "below":
            label = "agnostic"
        elif together.claim == "above":
            label = "specific"
        its = {name: of_line[layer] for name, of_line in by_line.items()}
        found.append(LayerAgreement(label, together, its))
    return found


def also_at(
    equal_computing: Sequence[LayerAgreement], nearest: Sequence[LayerAgreement] | None
) -> list[Agreement]:
    """What holds at equal computing and at nearest word error rates too: the rest is undecided."""
    if nearest is None:
        return [
            one.agreement if one.agreement.startswith("undecided") else "undecided: nearest WER"
            for one in equal_computing
        ]
    return [
        one.agreement if one.agreement == other.agreement else "undecided: nearest WER"
        for one, other in zip(equal_computing, nearest, strict=True)
    ]
