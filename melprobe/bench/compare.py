"""A grid of debiased linear CKA in minibatches, beside ckatorch, on random features on the CPU.

ckatorch (1.0.3) is called as its own `CKA` calls it: `cka_batch` for each pair of layers, on the
same minibatches. It multiplies in float64 and makes both Gram matrices anew for each pair. Its time
is that of a few whole minibatches, times their number: it is the same for each. (Its `CKA` keeps
the last batch's value only, which costs nothing, so the sums are left out here too.)
`ratio_shared_grams` is against its `hsic1` alone on Gram matrices that were made once, in float32.

`seconds_at_peak`: the multiplications of the method (a Gram matrix of each layer and minibatch, the
product of all with all) at the speed of a large float32 product on this machine.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from melprobe.analysis.comparison import BATCH
from melprobe.analysis.similarity import CkaGrid, u_centred
from melprobe.bench.peak import held_mb, measure_peak
from melprobe.errors import UsageError

POOL = 4
"""Different minibatches, taken in turn: all would not fit into memory"""
RIVAL_ROUNDS = 2


def bench_compare(
    layers: int, frames: int, width: int, tell: Callable[[str], None]
) -> dict[str, object]:
    """`seconds` of the whole grid of layers × layers, and ratios to others' estimated time.

    frames: of which whole minibatches are counted. `max_difference`: of the grids of the
    first minibatches. UsageError where ckatorch is not installed. tell: hears a line for each part.
    """
    if find_spec("ckatorch") is None or find_spec("seaborn") is None:
        raise UsageError("the comparison is with ckatorch: `pip install ckatorch`")
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(POOL, 1, BATCH, width, generator=generator)
    pool = shared + torch.randn(POOL, layers, BATCH, width, generator=generator)
    batches = frames // BATCH
    _grid(pool, POOL)  # the first call of a shape costs more
    start = time.perf_counter()
    _grid(pool, batches)
    seconds = time.perf_counter() - start
    peak_mb = held_mb()
    tell(f"ours: {seconds:.2f} s for {batches} minibatches")
    peak = measure_peak(torch.device("cpu"), torch.float32)
    flop = batches * layers * BATCH * (2 * BATCH * width + 2 * layers * BATCH)
    theirs, shared_grams, gap = [], [], 0.0
    for batch in pool[:RIVAL_ROUNDS]:
        start = time.perf_counter()
        found = _ckatorch(batch)
        theirs.append(time.perf_counter() - start)
        gap = max(gap, float((found - _grid(batch[None], 1)).abs().max()))
        start = time.perf_counter()
        _hsic_of_shared_grams(batch)
        shared_grams.append(time.perf_counter() - start)
        tell(f"ckatorch: {theirs[-1]:.2f} s a minibatch, {shared_grams[-1]:.2f} with shared Grams")
    return {
        "seconds": round(seconds, 2),
        "ratio_ckatorch": round(batches * min(theirs) / seconds, 1),
        "ratio_shared_grams": round(batches * min(shared_grams) / seconds, 1),
        "peak_mb": peak_mb,
        "seconds_at_peak": round(flop / peak, 2),
        "of_peak": round(flop / peak / seconds, 3),
        "tflop": round(flop / 1e12, 2),
        "peak_gflops": round(peak / 1e9, 1),
        "seconds_ckatorch": round(batches * min(theirs), 1),
        "minibatches_ckatorch": RIVAL_ROUNDS,
        "max_difference": gap,
        "layers": layers,
        "frames": batches * BATCH,
        "width": width,
        "minibatch": BATCH,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


def _grid(pool: Tensor, batches: int) -> Tensor:
    grid = CkaGrid()
    for number in range(batches):
        grid.add(u_centred(pool[number % len(pool)]))
    return grid.cka()


def _ckatorch(batch: Tensor) -> Tensor:
    from ckatorch import cka_batch  # imports seaborn: only here

    rows = [[cka_batch(x[None], y[None]) for y in batch] for x in batch]
    return torch.tensor(rows, dtype=torch.float64)


def _hsic_of_shared_grams(batch: Tensor) -> None:
    from ckatorch import hsic1

    grams = batch @ batch.mT
    for gram in grams:
        hsic1(gram.expand_as(grams), grams)
