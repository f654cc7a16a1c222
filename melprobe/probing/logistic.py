"""Logistic regression of one label on all layers of one width at once, streamed like ridge.

Features are brought to zero mean and unit variance, and mean cross-entropy in nat + λ/2 |W|² is
least: scikit-learn's LogisticRegression with C = 1 / (λ n). Every evaluation of the loss runs over
all pieces of all layers; rows beyond `HELD` are read anew each time, so memory is bounded. Half of
a layer's covariance bounds the Hessian for each class (Böhning 1992, doi:10.1007/BF00048682), and
its Cholesky factor, the search's first guess, spares most of the steps.

Shapes: L layers, N rows, n of a piece, D width, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from melprobe.probing.fit import Reading
from melprobe.probing.lbfgs import minimise
from melprobe.probing.ridge import PIECE, Pieces, Target

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""λ, from strong to weak: each solution is where the next search starts."""
TOLERANCE = 2e-4
"""Of a gradient, nat for each unit of a weight."""
STEPS = 300
HELD = 2**29
"""Bytes of training rows that are kept in memory between evaluations."""

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Rows of one split: features (L, n, D) as they were captured, and classes (n,)."""


def read_layers(
    layers: Sequence[Pieces],
    target: Target,
    train: Tensor,
    dev: Tensor,
    test: Tensor,
    penalties: Sequence[float] = PENALTIES,
) -> list[Reading]:
    """What each layer's probe makes of the test rows, its penalty chosen on the dev rows.

    train, dev and test (N,) choose rows at which the target's class is known. Layers are of one
    width, and their pieces of the same sizes.
    """
    mean, scale, correlation = standards(batches_of(layers, target, train))

    def split(rows: Tensor) -> Batches:
        return standardised(batches_of(layers, target, rows), mean, scale)

    on_train, on_dev = held(split(train)), split(dev)
    shape = (len(layers), mean.shape[2] + 1, target.n_classes)
    weights = mean.new_zeros(shape)
    best, kept = weights, train.sum()
    most = torch.full(shape[:1], -1.0, device=mean.device)
    chosen = torch.zeros(len(layers))
    for penalty in penalties:
        strengths = torch.full((len(layers),), penalty, device=mean.device)
        weights = solve(on_train, weights, strengths, int(kept), correlation)
        right = torch.stack([(_predict(weights, x) == y).sum(1) for x, y in on_dev()]).sum(0)
        better = right > most
        most = torch.where(better, right, most)
        best = torch.where(better[:, None, None], weights, best)
        chosen[better.cpu()] = penalty
    found = torch.cat([_predict(best, x) for x, _ in split(test)()], 1).cpu()
    return [Reading(round(float(p), 9), f) for p, f in zip(chosen, found, strict=True)]


def standardised(batches: Batches, mean: Tensor, scale: Tensor) -> Batches:
    """The same rows with features of zero mean and unit variance; both (L, 1, D)."""
    return lambda: (((x - mean) * scale, y) for x, y in batches())


def held(batches: Batches) -> Batches:
    """The same batches, the first of them from memory."""
    kept, size = list[tuple[Tensor, Tensor]](), 0
    for batch in batches():
        size += batch[0].nbytes
        if size > HELD:
            break
        kept.append(batch)
    else:
        return lambda: kept
    return lambda: chain(kept, islice(batches(), len(kept), None))


def solve(
    batches: Batches, start: Tensor, penalties: Tensor, count: int, correlation: Tensor
) -> Tensor:
    """Weights (L, D + 1, K), the last row the bias, of least loss over `count` rows.

    penalties (L,); correlation (L, D, D) of the features.
    """
    shape, penalty = start.shape, penalties[:, None, None]
    eye = torch.eye(shape[1] - 1, dtype=correlation.dtype, device=correlation.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation / 2 + penalty * eye))
    inverse = inverse.float()

    def precondition(flat: Tensor) -> Tensor:
        each = flat.view(shape)
        return torch.cat([inverse @ each[:, :-1], 2 * each[:, -1:]], 1).flatten(1)

    def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
        weights = flat.view(shape)
        kept = weights[:, :-1]
        loss = penalties / 2 * kept.square().sum((1, 2), dtype=torch.float64)
        gradient = torch.cat([penalty * kept, torch.zeros_like(weights[:, -1:])], 1)
        for x, y in batches():
            log_probs = log_chances(weights, x)
            picked = y.expand(len(x), -1)[..., None]
            loss -= log_probs.gather(2, picked).sum((1, 2), dtype=torch.float64) / count
            slope = log_probs.exp_()
            slope.scatter_add_(2, picked, slope.new_full((1, 1, 1), -1.0).expand(picked.shape))
            slope /= count
            gradient[:, :-1].baddbmm_(x.mT, slope)
            gradient[:, -1] += slope.sum(1)
        return loss, gradient.flatten(1)

    found = minimise(evaluate, start.flatten(1), precondition, tolerance=TOLERANCE, steps=STEPS)
    return found.view(shape)


def log_chances(weights: Tensor, x: Tensor) -> Tensor:
    """Log-probabilities (L, n, K), in nat, of the classes of standardised rows (L, n, D)."""
    return _logits(weights, x).log_softmax(2)


def _predict(weights: Tensor, x: Tensor) -> Tensor:
    """Classes (L, n) of standardised rows (L, n, D)."""
    return _logits(weights, x).argmax(2)


def _logits(weights: Tensor, x: Tensor) -> Tensor:
    return torch.baddbmm(weights[:, -1:], x, weights[:, :-1])


def standards(batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and one over the standard deviation, (L, 1, D), 0 for what does not vary; correlation.

    The last is (L, D, D) in double precision.
    """
    count, shift, sums, products = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for x, _ in batches():
        if not count:
            shift = x.mean(1, keepdim=True)
            sums = torch.zeros_like(shift, dtype=torch.float64)
            products = sums.mT @ sums
        count += x.shape[1]
        centred = x - shift
        sums += centred.sum(1, keepdim=True, dtype=torch.float64)
        products += centred.mT @ centred
    middle, squares = sums / count, products.diagonal(dim1=1, dim2=2)[:, None] / count
    covariance = products / count - middle.mT @ middle
    variance = covariance.diagonal(dim1=1, dim2=2)[:, None]
    alive = variance > 1e-12 * squares.clamp(min=1e-30)
    scale = torch.where(alive, variance.clamp(min=1e-300).rsqrt(), 0.0)
    return shift + middle.float(), scale.float(), covariance * scale.mT * scale


def batches_of(layers: Sequence[Pieces], target: Target, rows: Tensor) -> Batches:
    """The chosen rows of all layers side by side."""

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for pieces in zip(*(layer() for layer in layers), strict=True):
            chosen = rows[start : start + len(pieces[0])].nonzero()[:, 0]
            for part in chosen.split(PIECE):
                place = part.to(pieces[0].device)
                x = torch.stack([piece[place].float() for piece in pieces])
                yield x, target.values[part + start].to(x.device)
            start += len(pieces[0])

    return read
