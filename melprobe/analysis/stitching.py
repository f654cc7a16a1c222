"""Stitching two arms of a pair, and exchanging their blocks: rows, and what they say.

Whose answer is worse off, and by how much? Damage d = (NLL − NLL_intact) / (NLL_swapped −
NLL_intact), where swapped hears another clip. For an exchanged block, intact and swapped are those
of the arm that got it. A stitched model has two arms, and can't be asked to hear more than the one
that hears less: there both are that arm's, and d below 0 says that the two together hear more.

What comes from below is taken at all positions but BOS, which is the same for every clip and an
attention sink. Affine maps are ridge regressions fitted on other utterances, one for patches and
one for tokens: below the first block the arms' patches differ and their tokens don't. Penalised is
how far a map is from changing nothing. A block is exchanged as it is, its weights in the other's
place, or between the maps: what enters it goes into the other arm's coordinates, and what the
other's block adds comes back.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from melprobe.analysis.gate import listening_gate
from melprobe.analysis.statistics import Bootstrap
from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.audio.patches import patch_rate
from melprobe.errors import UsageError
from melprobe.hooks.maps import ResidualMap
from melprobe.hooks.positions import Kind
from melprobe.hooks.replay import Replay, Variant
from melprobe.hooks.stitching import borrow_block, exchange_block, stitch
from melprobe.listener import Listener
from melprobe.model.inference import batches_by_length

ARMS = ("A", "B")
STITCHED = ("stitched", "stitched, mapped")
EXCHANGED = ("exchanged", "exchanged, mapped")
_RIDGE = 1e-4
"""of a dimension's mean sum of squares, of patches and of tokens"""
_BATCH_SECONDS = 60 * 16_000
Waves = Sequence[np.ndarray]


class Pair(NamedTuple):
    """Two models that read the same prompts."""

    a: Listener
    b: Listener

    def replays(self, waves: Waves, texts: Sequence[str]) -> tuple[Replay, Replay]:
        """The same batch heard by both, without decoding. UsageError unless it is as long in both.

        A clip's patches have to stand at the same places, or a residual would be put elsewhere.
        """
        a, b = (lm.replay(waves, texts, 0) for lm in self)
        if not torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]):
            counts = [(r.kinds == Kind.SPEECH).sum(1).tolist() for r in (a, b)]
            raise UsageError(
                f"the two models have {counts[0]} and {counts[1]} patches in the same clips, or "
                "other prompts: stitch models with one token rate and one prompt"
            )
        return a, b


def check_pair(a: Any, b: Any) -> None:
    """UsageError for configurations (`MelLLMConfig`) whose blocks don't fit each other."""
    if a.base_sha256 != b.base_sha256:
        raise UsageError(f"A stands over {a.base}, B over {b.base}: stitching needs one base")
    rates = [config.frames_per_patch for config in (a, b)]
    if rates[0] != rates[1]:
        hertz = [f"{patch_rate(frames):g}" for frames in rates]
        raise UsageError(
            f"A has {hertz[0]} patches a second, B {hertz[1]}: stitching needs one token rate"
        )


class Map:
    """From one arm's residuals (N, D) into the other's: affine, for patches and for tokens."""

    def __init__(self, source: Tensor, target: Tensor, is_patch: Tensor):
        """source, target: (N, D) at the same positions of the same clips; is_patch: (N,) bool.

        UsageError where either has no more positions than dimensions.
        """
        self._by_kind = {}
        for kind in (True, False):
            x, y = (rows[is_patch == kind] for rows in (source, target))
            # The size of residuals grows from block to block.
            spread = (x - x.mean(0)).square().sum() / x.shape[1]
            self._by_kind[kind] = ResidualMap([x], [y - x], _RIDGE * spread.item())
        lost = (target - self(source, is_patch))[is_patch].double().square().sum()
        there = (target[is_patch] - target[is_patch].mean(0)).double().square().sum()
        self.r2 = 1 - float(lost / there)
        """Explained variance of patches, on what it was fitted on."""

    def __call__(self, rows: Tensor, is_patch: Tensor) -> Tensor:
        """The other's residuals (N, D)."""
        found = rows.clone()
        for kind, one in self._by_kind.items():
            found[is_patch == kind] += one([rows[is_patch == kind]])[0]
        return found

    def change(self, rows: Tensor, is_patch: Tensor) -> Tensor:
        """What a change (N, D) of the one's residuals is in the other's."""
        found = rows.clone()
        for kind, one in self._by_kind.items():
            found[is_patch == kind] += one.change(rows[is_patch == kind])
        return found


def fit_maps(pair: Pair, waves: Waves, texts: Sequence[str]) -> dict[str, list[Map]]:
    """Of each receiver, affine maps into its residuals h_0 to h_L from the other's."""
    kept: list[list[list[Tensor]]] = [[[] for _ in range(pair.a.n_layers + 1)] for _ in ARMS]
    patches = []
    for places in _batches(waves):
        replays = pair.replays([waves[i] for i in places], [texts[i] for i in places])
        where = _taken(replays[0])
        patches.append(replays[0].where("speech")[where])
        for of_arm, replay in zip(kept, replays, strict=True):
            for rows, residual in zip(of_arm, replay.residuals, strict=True):
                rows.append(residual[where].float())
    is_patch = torch.cat(patches)
    a, b = ([torch.cat(rows) for rows in of_arm] for of_arm in kept)
    return {
        "A": [Map(source, target, is_patch) for source, target in zip(b, a, strict=True)],
        "B": [Map(source, target, is_patch) for source, target in zip(a, b, strict=True)],
    }


def stitch_rows(
    pair: Pair,
    maps: dict[str, list[Map]],
    waves: Waves,
    partners: Sequence[int],
    texts: Sequence[str],
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """A row for each clip, arm and condition: clip, arm, condition, layer, nll, tokens.

    clip: its number. arm: the one that answers, with its upper blocks or with one of the other's.
    nll: nat of the reference, summed over its tokens. advance: hears how many clips are done.
    """
    rows: list[pd.DataFrame] = []
    for places in _batches(waves):
        said = [texts[i] for i in places]
        swapped = pair.replays([waves[partners[i]] for i in places], said)
        own = pair.replays([waves[i] for i in places], said)
        for arm, (replay, other) in enumerate((own, own[::-1])):
            heard = {("intact", -1): replay.intact, ("swapped", -1): swapped[arm].intact}
            into, out_of = maps[ARMS[arm]], maps[ARMS[1 - arm]]
            for condition, layer, variant in _variants(pair, into, out_of, replay, other):
                heard[condition, layer] = next(replay.hear_each([variant]))
            rows += [
                pd.DataFrame(
                    {
                        "clip": places,
                        "arm": ARMS[arm],
                        "condition": condition,
                        "layer": layer,
                        "nll": one.nll.tolist(),
                        "tokens": one.tokens.tolist(),
                    }
                )
                for (condition, layer), one in heard.items()
            ]
        advance(len(places))
    return pd.concat(rows, ignore_index=True)


def _variants(
    pair: Pair,
    into: Sequence[Map],
    out_of: Sequence[Map],
    replay: Replay,
    other: Replay,
) -> Iterator[tuple[str, int, Variant]]:
    """All that is done to the arm of `replay` with what its `other` has.

    into, out_of: maps of the other's residuals into this arm's, and of this arm's into the other's.
    """
    where = _taken(replay)
    is_patch = replay.where("speech")[where]
    for layer, residual in enumerate(other.residuals[:-1]):
        mapped = residual.clone()
        mapped[where] = into[layer](residual[where].float(), is_patch).to(residual)
        for condition, values in zip(STITCHED, (residual, mapped), strict=True):
            cut = partial(stitch, replay.model, layer, values, where)
            yield condition, layer, Variant(cut, layer, by_position=False)
        exchange = partial(exchange_block, pair.a.model, pair.b.model, layer)
        borrow = partial(
            borrow_block,
            replay.model,
            other.model,
            layer,
            residual,
            where,
            there=partial(out_of[layer], is_patch=is_patch),
            # By the next map: below the first block not all directions are there to be fitted.
            back=partial(into[layer + 1].change, is_patch=is_patch),
        )
        yield EXCHANGED[0], layer, Variant(exchange, layer, by_position=False)
        yield EXCHANGED[1], layer, Variant(borrow, layer + 1, by_position=False)


def score_stitching(rows: pd.DataFrame, speakers: Sequence[str], seed: int) -> dict[str, Any]:
    """`worse` (the arm that hears less) and `layers` of results.json: d of every condition, with

    bands that hold over all layers of an arm and condition at once. speakers: of each clip.
    """
    bootstrap = Bootstrap(speakers, seed=seed)
    intact = {arm: _of_condition(rows, arm, "intact") for arm in ARMS}
    swapped = {arm: _of_condition(rows, arm, "swapped") for arm in ARMS}
    worse = max(ARMS, key=lambda arm: intact[arm].nll.sum())
    layers = []
    for arm in ARMS:
        for condition in (*STITCHED, *EXCHANGED):
            of = arm if condition in EXCHANGED else worse
            cut = rows[(rows.arm == arm) & (rows.condition == condition)]
            table = cut.pivot(index="clip", columns="layer", values="nll").sort_index()
            above = table.to_numpy() - intact[of].nll.to_numpy()[:, None]
            gap = (swapped[of].nll - intact[of].nll).to_numpy()
            damage = bootstrap.bands(above, gap)
            nat = bootstrap.bands(above, intact[of].tokens.to_numpy())
            layers += [
                {
                    "arm": arm,
                    "condition": condition,
                    "layer": int(layer),
                    "damage": d.value if gap.sum() > 0 else None,
                    "damage_ci": d.limits,
                    "delta_nll": nll.value,
                    "delta_nll_ci": nll.limits,
                    "beside": of,
                }
                for layer, d, nll in zip(table.columns, damage, nat, strict=True)
            ]
    unit = {"unit": bootstrap.unit, "n_units": bootstrap.n_units}
    return {"worse": worse, "layers": layers, "intervals": unit}


def gate_of(
    rows: pd.DataFrame,
    arm: str,
    lm: Listener,
    waves: Waves,
    partners: Sequence[int],
    texts: Sequence[str],
    speakers: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Whether the arm hears: `melprobe.analysis.gate.listening_gate`, on the clips of `rows`."""
    most = max(len(lm.processor.answer_ids(text)) for text in texts) * 3 // 2
    swapped = [waves[i] for i in partners]
    errors = []
    for places in _batches(swapped):
        answers = lm.transcribe([swapped[i] for i in places], most)
        errors += [count_errors(texts[i], a) for i, a in zip(places, answers, strict=True)]
    own, other = (_of_condition(rows, arm, condition) for condition in ("intact", "swapped"))
    bootstrap = Bootstrap(speakers, seed=seed)
    return listening_gate(bootstrap, own.nll, other.nll, own.tokens, corpus_wer(errors))


def _of_condition(rows: pd.DataFrame, arm: str, condition: str) -> pd.DataFrame:
    return rows[(rows.arm == arm) & (rows.condition == condition)].set_index("clip").sort_index()


def _batches(waves: Waves) -> Iterator[list[int]]:
    return batches_by_length([len(wave) for wave in waves], _BATCH_SECONDS)


def _taken(replay: Replay) -> Tensor:
    """(B, S) the positions that are taken from the other arm: all but BOS and padding."""
    return replay.where("all") & ~replay.where("bos")
