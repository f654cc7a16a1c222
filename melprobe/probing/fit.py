"""One layer, all labels: train, choose each label's penalty on the dev split, read the test."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from melprobe.probing.ridge import PENALTIES, Fitted, Moments, Pieces, Target, numbered
from melprobe.probing.tasks import Task


class Reading(NamedTuple):
    """What a probe made of the test rows of its task, in their order."""

    penalty: float
    found: Tensor
    """(n,) class numbers, or squared errors in units of the training variance, mean over columns"""


def read_layer(
    pieces: Pieces, tasks: Sequence[Task], penalties: Sequence[float] = PENALTIES
) -> list[list[Reading]]:
    """A reading of each target of each task, by ridge from one layer.

    `pieces` gives the layer's rows three times over: to train, to choose penalties, to test.
    """
    moments = [Moments(task.targets, task.train) for task in tasks]
    for start, piece in numbered(pieces()):
        for sums in moments:
            sums.add(piece, start)
    fitted = [sums.solve(penalties) for sums in moments]
    scores = [torch.zeros(len(task.targets), len(penalties)) for task in tasks]
    for start, piece in numbered(pieces()):
        for task, maps, score in zip(tasks, fitted, scores, strict=True):
            rows = _rows(task.dev, start, piece)
            if len(rows):
                out = maps.predict(piece[rows.to(piece.device)])
                score += _goodness(task.targets, out, rows + start).cpu()
    best = [score.argmax(1) for score in scores]
    chosen = [_chosen(*each) for each in zip(tasks, fitted, best, strict=True)]
    found: list[list[list[Tensor]]] = [[[] for _ in task.targets] for task in tasks]
    for start, piece in numbered(pieces()):
        for task, maps, lists in zip(tasks, chosen, found, strict=True):
            rows = _rows(task.test, start, piece)
            out = maps.predict(piece[rows.to(piece.device)])[0]
            for target, columns, into in zip(
                task.targets, out.split([t.columns for t in task.targets], 1), lists, strict=True
            ):
                into.append(_outcome(target, columns, rows + start).cpu())
    return [
        [Reading(penalties[int(i)], torch.cat(into)) for i, into in zip(b, lists, strict=True)]
        for b, lists in zip(best, found, strict=True)
    ]


def _rows(wanted: Tensor, start: int, piece: Tensor) -> Tensor:
    return wanted[start : start + len(piece)].nonzero()[:, 0]


def _goodness(targets: Sequence[Target], out: Tensor, rows: Tensor) -> Tensor:
    """(targets, Λ): right answers, or minus the squared error, of predictions (Λ, n, C)."""
    found, at = [], 0
    for target in targets:
        columns = out[:, :, at : at + target.columns]
        values = target.values[rows].to(out.device)
        if target.n_classes:
            found.append((columns.argmax(2) == values).sum(1).float())
        else:
            found.append(-(columns - values).square().sum((1, 2)))
        at += target.columns
    return torch.stack(found)


def _chosen(task: Task, maps: Fitted, best: Tensor) -> Fitted:
    """The map in which each target has the columns of its best penalty."""
    sizes = [target.columns for target in task.targets]
    weights, biases = maps.weights.split(sizes, 2), maps.bias.split(sizes, 1)
    return Fitted(
        maps.mean,
        torch.cat([w[i] for w, i in zip(weights, best, strict=True)], 1)[None],
        torch.cat([b[i] for b, i in zip(biases, best, strict=True)])[None],
    )


def _outcome(target: Target, columns: Tensor, rows: Tensor) -> Tensor:
    """(n,) of predictions (n, K), as `Reading.found` has it."""
    if target.n_classes:
        return columns.argmax(1)
    return (columns - target.values[rows].to(columns.device)).square().mean(1)
