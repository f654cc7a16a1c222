"""Stitching two arms of a pair, and exchanging their blocks: rows, and what they say.

Whose answer is worse off, and by how much? Damage d = (NLL − NLL_intact) / (NLL_swapped −
NLL_intact), where swapped hears another clip. For an exchanged block, intact and swapped are those
of the arm that got it. A stitched model has two arms, and can't be asked to hear more than the one
that hears less: there both are that arm's, and d below 0 says that the two together hear more.

What comes from below is taken at all positions but BOS, which is the same for every clip and an
attention sink. Through the affine map it goes by ridge regression, fitted on other utterances.
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
from melprobe.hooks.stitching import exchange_block, stitch
from melprobe.listener import Listener
from melprobe.model.inference import batches_by_length

ARMS = ("A", "B")
STITCHED = ("stitched", "stitched, mapped")
EXCHANGED = "exchanged"
_RIDGE = 1e-4
"""of the mean sum of squares of a dimension"""
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


def fit_maps(pair: Pair, waves: Waves, texts: Sequence[str]) -> dict[str, list[ResidualMap]]:
    """Of each receiver, an affine map into its residuals h_0, h_1, … from the other's."""
    kept: list[list[list[Tensor]]] = [[[] for _ in range(pair.a.n_layers)] for _ in ARMS]
    for places in _batches(waves):
        replays = pair.replays([waves[i] for i in places], [texts[i] for i in places])
        where = _taken(replays[0])
        for of_arm, replay in zip(kept, replays, strict=True):
            for rows, residual in zip(of_arm, replay.residuals, strict=False):
                rows.append(residual[where].float())
    a, b = kept
    return {
        "A": [_map(source, target) for source, target in zip(b, a, strict=True)],
        "B": [_map(source, target) for source, target in zip(a, b, strict=True)],
    }


def _map(source: Sequence[Tensor], target: Sequence[Tensor]) -> ResidualMap:
    """Its penalty goes with the size of the residuals, which grows from block to block."""
    rows = torch.cat(list(source))
    spread = (rows - rows.mean(0)).square().sum() / rows.shape[1]
    return ResidualMap(source, target, _RIDGE * spread.item())


def stitch_rows(
    pair: Pair,
    maps: dict[str, list[ResidualMap]],
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
            for condition, layer, variant in _variants(pair, maps[ARMS[arm]], replay, other):
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
    pair: Pair, maps: Sequence[ResidualMap], replay: Replay, other: Replay
) -> Iterator[tuple[str, int, Variant]]:
    """All that is done to the arm of `replay` with what its `other` has."""
    where = _taken(replay)
    for layer, residual in enumerate(other.residuals[:-1]):
        mapped = residual.clone()
        mapped[where] = maps[layer]([residual[where].float()])[0].to(residual)
        for condition, values in zip(STITCHED, (residual, mapped), strict=True):
            cut = partial(stitch, replay.model, layer, values, where)
            yield condition, layer, Variant(cut, layer, by_position=False)
        cut = partial(exchange_block, pair.a.model, pair.b.model, layer)
        yield EXCHANGED, layer, Variant(cut, layer, by_position=False)


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
        for condition in (*STITCHED, EXCHANGED):
            of = arm if condition == EXCHANGED else worse
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
