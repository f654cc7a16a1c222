"""Which blocks to cut together: the mildest sets, chosen on clips that are not reported.

The mildest of many sets looks milder than it is on the clips that chose it. So a study that
chooses spends half of its clips on the choice, by likelihood alone, and reports on the others.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from melprobe.analysis.damage import DAMAGE_MARGIN
from melprobe.analysis.study import LayerStudy
from melprobe.analysis.sweep import StudyBatch, with_means
from melprobe.errors import UsageError
from melprobe.hooks.layers import format_layers
from melprobe.hooks.parts import Target
from melprobe.listener import Listener
from melprobe.store import RowStore

MOST_CLIPS = 60
"""spent on a choice: their residuals stay in memory"""
BEAM = 4

BlockSet = frozenset[int]


class Chosen(NamedTuple):
    """The outcome of a choice."""

    study: LayerStudy
    """What is left to ask: the chosen sets, in order, on the clips that had no part in it."""
    ways: dict[str, list[str]]
    """By a set's label in rows: the ways of choosing that came upon it."""
    n_clips: int
    """that chose"""
    n_tried: int
    """sets"""
    free: list[int]
    """blocks that were not to be chosen, since cutting them costs nothing by construction"""


def choose_sets(
    listener: Listener, study: LayerStudy, store: RowStore, advance: Callable[[int], None]
) -> Chosen:
    """Choose the sets that the study's question asks for, out of the blocks in its targets.

    But for a block that costs nothing by construction: it would be the first choice of all.

    Damages that were computed are kept in `store`, so that a stopped choice goes on; `advance(n)`
    hears of n sets done.
    """
    free = study.question.unread_block(listener.processor, listener.n_layers, study.given)
    offered = [block for target in study.targets for block in target.layers]
    blocks = [block for block in offered if str(block) != free]
    deciding, reported = halves(len(study.utterances))
    trials = Trials(listener, study.of(deciding), store, advance)
    if study.question.layers == "greedy":
        ways = {found: ["greedy"] for found in greedy(trials, blocks)}
    else:
        n = study.question.picks(len(offered))
        found = {
            "greedy": beam_search(trials, blocks, n, width=1),
            "beam search": beam_search(trials, blocks, n, BEAM),
            "angular distance": trials.least_turned(blocks, n),
            "block influence": trials.least_influential(blocks, n),
        }
        ways = {s: [way for way, its in found.items() if its == s] for s in found.values()}
    return Chosen(
        replace(study.of(reported), targets=[_target(blocks) for blocks in ways]),
        {format_layers(blocks): by for blocks, by in ways.items()},
        len(deciding),
        len(store.tried()),
        sorted(set(offered) - set(blocks)),
    )


def halves(n: int) -> tuple[list[int], list[int]]:
    """Places of the clips that choose and of those that are reported, of n.

    UsageError where there are too few.
    """
    if n < 4:
        raise UsageError(
            f"choosing blocks takes half of the clips, and there are {n}: take 4 or more (--limit)"
        )
    deciding = range(0, min(n, 2 * MOST_CLIPS), 2)
    return list(deciding), sorted(set(range(n)) - set(deciding))


class Trials:
    """The damage d of any set of blocks on the clips that choose; see `melprobe.analysis.damage`"""

    def __init__(
        self,
        listener: Listener,
        study: LayerStudy,
        store: RowStore,
        advance: Callable[[int], None],
    ):
        self.study, self.store, self.advance = with_means(listener, study), store, advance
        self.batches, intact, swapped = [], 0.0, 0.0
        for places in study.batches(listener):
            batch = StudyBatch(listener, self.study, places, max_new_tokens=0)
            intact += batch.replay.intact.nll.sum().item()
            swapped += batch.swapped.intact.nll.sum().item()
            del batch.swapped
            self.batches.append(batch)
        self.intact, self.gap = intact, swapped - intact
        if self.gap <= 0:
            raise UsageError(
                "choosing blocks: swapping clips does not hurt this model, so there is no damage "
                "to choose by; see the gate in a report without a choice"
            )
        self.known = store.tried()

    def damage(self, sets: Iterable[BlockSet]) -> dict[BlockSet, float]:
        """Of each of these sets."""
        sets = list(sets)
        for blocks in sets:
            label = format_layers(blocks)
            if label in self.known:
                continue
            nll = sum(
                heard.nll.sum().item()
                for batch in self.batches
                for heard in batch.replay.hear_each([batch.variant(_target(blocks))])
            )
            self.known[label] = (nll - self.intact) / self.gap
            self.store.add_tried(label, self.known[label])
            self.advance(1)
        return {blocks: self.known[format_layers(blocks)] for blocks in sets}

    def least_turned(self, blocks: Collection[int], n: int) -> BlockSet:
        """The n neighbouring blocks that turn the residual least together (2403.17887)."""
        angle = self._mean_change(n, 1)
        firsts = [b for b in sorted(blocks) if set(range(b, b + n)) <= set(blocks)]
        if not firsts:
            raise UsageError(f"picks:{n}: there are no {n} neighbouring blocks to choose")
        first = min(firsts, key=lambda block: angle[block])
        return frozenset(range(first, first + n))

    def least_influential(self, blocks: Collection[int], n: int) -> BlockSet:
        """The n blocks of the least block influence, 1 − cos (ShortGPT, 2403.03853)."""
        cosine = self._mean_change(1, 0)
        return frozenset(sorted(blocks, key=lambda block: -cosine[block])[:n])

    def _mean_change(self, span: int, score: int) -> Mapping[int, float]:
        """Mean over clips, by first block, of the cosine (score 0) or the angle (1)."""
        where = self.study.question.positions
        changes = [batch.replay.block_change(where, span) for batch in self.batches]
        return {
            first: torch.cat([change[first][score] for change in changes]).mean().item()
            for first in range(len(changes[0]))
        }


def greedy(trials: Trials, blocks: Collection[int]) -> list[BlockSet]:
    """Drop the least harmful block next, until the damage passes the margin."""
    path = [frozenset[int]()]
    while path[-1] != frozenset(blocks):
        damage = trials.damage(_larger(path[-1:], blocks))
        path.append(_mildest(damage, 1)[0])
        if damage[path[-1]] > DAMAGE_MARGIN:
            break
    return path[1:]


def beam_search(trials: Trials, blocks: Collection[int], n: int, width: int) -> BlockSet:
    """The mildest set of n blocks that grows out of the `width` mildest of n - 1, and so on."""
    beam = [frozenset[int]()]
    for _ in range(n):
        beam = _mildest(trials.damage(_larger(beam, blocks)), width)
    return beam[0]


def _target(blocks: BlockSet) -> Target:
    return Target(tuple(sorted(blocks)))


def _larger(sets: Iterable[BlockSet], blocks: Collection[int]) -> list[BlockSet]:
    """Each set with each other block added, once."""
    return list(
        dict.fromkeys(
            before | {block} for before in sets for block in sorted(blocks) if block not in before
        )
    )


def _mildest(damage: Mapping[BlockSet, float], n: int) -> list[BlockSet]:
    """Ties fall to the highest blocks."""
    return sorted(damage, key=lambda blocks: (damage[blocks], [-b for b in sorted(blocks)]))[:n]
