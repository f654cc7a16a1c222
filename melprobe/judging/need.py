"""Need: at which positions do a model's blocks have to work?

Of each block, whether skipping it does damage at or above the margin, or below: at speech positions
while it listens; at the prompt's and answer's own positions, likewise; and where words stand that
are to be copied, in the decoder that all runs share. The last is the control: what any text needs
as well is no listening. A block needed for the first alone serves speech, for one of the others
alone text. An arm's blocks are what they are in every one of its runs (intersection-union); what
the runs don't share is undecided.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from melprobe.analysis.claims import (
    AllOf,
    EitherOf,
    LayerClaim,
    Testable,
    claims,
    detectable_margins,
)
from melprobe.analysis.statistics import Floats

Need = Literal["speech", "text", "both", "neither", "undecided"]
_NEEDS: Mapping[tuple[str, str], Need] = {
    ("above", "below"): "speech",
    ("below", "above"): "text",
    ("above", "above"): "both",
    ("below", "below"): "neither",
}


class LayerNeed(NamedTuple):
    """What is said of a block of an arm."""

    need: Need
    speech: LayerClaim
    """of the damage at speech positions, in all runs"""
    text: LayerClaim
    """of the larger damage at positions of text and in copying, in all runs"""
    answer: LayerClaim
    """of that at positions of text, while it listens"""
    copying: LayerClaim
    """of that where words stand that are copied"""


def needs(
    speech: Sequence[Testable], answer: Sequence[Testable], copying: Testable, margin: float
) -> list[LayerNeed]:
    """Of each of L blocks of an arm, from tests of damage [L], in the order of its runs."""
    lines = {
        "speech": AllOf(speech),
        "text": AllOf([EitherOf([one, copying]) for one in answer]),
        "answer": AllOf(answer),
        "copying": copying,
    }
    found = {name: claims(tests, margin) for name, tests in lines.items()}
    layers = zip(*found.values(), strict=True)
    return [
        LayerNeed(_NEEDS.get((s.claim, t.claim), "undecided"), s, t, a, c) for s, t, a, c in layers
    ]


class TopQuarter(NamedTuple):
    """The paper's claim of its models: the top quarter isn't needed for speech, and the rest is."""

    top: LayerClaim
    """of the damage of skipping all of the top quarter at speech positions, in all runs"""
    rest: LayerClaim
    """of that of each block below, one at a time: above in all of them, or below in all"""
    spare: list[int]
    """blocks below that are not needed, in all runs"""
    verdict: Literal["agrees", "disagrees", "undecided"]


def top_quarter_claim(
    top: Sequence[Testable], speech: Sequence[Testable], below: int, margin: float
) -> TopQuarter:
    """top: tests of one figure each, speech: of blocks, of which the first `below` are the rest."""
    (of_top,) = claims(AllOf(top), margin)
    of_all = claims(AllOf(speech), margin)[:below]
    (of_rest,) = claims(_AllLayers(AllOf(speech), below), margin)
    spare = [block for block, one in enumerate(of_all) if one.claim == "below"]
    verdict: Literal["agrees", "disagrees", "undecided"] = "undecided"
    if of_top.claim == "below" and of_rest.claim == "above":
        verdict = "agrees"
    elif of_top.claim == "above" or spare:
        verdict = "disagrees"
    return TopQuarter(of_top, of_rest, spare, verdict)


class _AllLayers:
    """The first so many layers' figures as one: all above, or all below."""

    def __init__(self, tests: Testable, count: int):
        self.tests, self.count = tests, count

    @property
    def values(self) -> Floats:
        return self.tests.values[: self.count].max(keepdims=True)

    @property
    def errors(self) -> Floats:
        return self.tests.errors[: self.count].max(keepdims=True)

    def p_below(self, margin: float) -> Floats:
        return self.tests.p_below(margin)[: self.count].max(keepdims=True)

    def p_above(self, margin: float) -> Floats:
        return self.tests.p_above(margin)[: self.count].max(keepdims=True)


def detectable(tests: Sequence[Testable]) -> list[float]:
    """[L] the margin at which a block of no damage would be found spare in every run."""
    return detectable_margins(AllOf(tests)).tolist()
