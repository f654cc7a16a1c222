"""What probes read: the layers of captures, and what there is before any model, mel patches.

A series is a row of layers of one width: a capture's, a floor's, or mel patches alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from melprobe.captured import Capture
from melprobe.errors import UsageError
from melprobe.probing.ridge import PIECE, Pieces

MODEL, MEL, NORM = "model", "mel", "norm"
RESERVED = (MODEL, MEL)


@dataclass(frozen=True, slots=True)
class Series:
    """Layers that are drawn as one line."""

    name: str
    layers: dict[str, Pieces]
    """`h_0` …, `norm`: the last one behind the final norm; or `mel`"""


def capture_series(name: str, capture: Capture) -> Series:
    """Every captured residual, and the last block's behind the final norm.

    The norm is a row's scaling to unit mean square, as in Llama's and most decoders' RMSNorm; its
    gains, one a dimension, make no difference to a probe of standardised features.
    """
    layers: dict[str, Pieces] = {f"h_{n}": partial(capture.pieces, n) for n in capture.numbers}
    last = capture.index["blocks"]
    if last in capture.numbers:
        layers[NORM] = partial(_normed, partial(capture.pieces, last))
    return Series(name, layers)


def mel_series(patches: NDArray[np.float32]) -> Series:
    """The log-mel frames of each patch (N, r·M), as the model's first projection sees them."""
    # No label is known where no patch stands; but 0 times NaN is NaN.
    rows = torch.from_numpy(np.nan_to_num(patches))
    return Series(MEL, {MEL: partial(rows.split, PIECE)})


def open_floors(named: Mapping[str, Path], capture: Capture) -> list[Series]:
    """Other models' captures of the same rows, by name.

    UsageError where a name is taken, or a capture has other clips, positions or patch times.
    """
    found = []
    rows = capture.rows
    for name, folder in named.items():
        if name in RESERVED:
            raise UsageError(f"--floor {name}={folder}: the name is taken; take another")
        other = Capture.open(folder)
        theirs = other.rows
        same = (
            list(other.utterances.index) == list(capture.utterances.index)
            and len(theirs) == len(rows)
            and bool((theirs.utterance.cat.codes == rows.utterance.cat.codes).all())
            and np.allclose(theirs.seconds, rows.seconds, atol=1e-3, equal_nan=True)
        )
        if not same:
            raise UsageError(
                f"--floor {name}={folder}: has other clips or patches than {capture.folder}; "
                "capture both with the same --data, --limit, --seed, --positions and patch rate"
            )
        found.append(capture_series(name, other))
    return found


def _normed(pieces: Pieces) -> Iterator[Tensor]:
    for piece in pieces():
        piece = piece.float()
        yield piece * (piece.square().mean(1, keepdim=True) + 1e-6).rsqrt()
