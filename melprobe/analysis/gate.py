"""The listening gate: whether a model's answers hang on what it is given to hear.

A claim about layers needs it: a deaf model's text prior answers for it, and makes every layer look
dispensable.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from melprobe.analysis.statistics import Bootstrap

GATE_NAT = 0.5
GATE_WER = 0.9


def listening_gate(
    bootstrap: Bootstrap,
    intact: ArrayLike,
    swapped: ArrayLike,
    tokens: ArrayLike,
    wer_swapped: float,
    what: str = "audio",
) -> dict[str, Any]:
    """`gate` of results.json.

    intact, swapped [N]: nat of each answer under its own clip and under another; tokens [N]: of
    each answer.
    """
    own, other, below = (np.asarray(x, np.float64) for x in (intact, swapped, tokens))
    gap = bootstrap.ratio(other - own, below)
    hears, reads = gap.low > GATE_NAT, wer_swapped > GATE_WER
    reason = (
        f"swapping the {what} costs {gap.value:.2f} nat per answer token (95 % interval from "
        f"{gap.low:.2f}; {'above' if hears else 'not above'} {GATE_NAT}), and WER on swapped "
        f"{what} is {100 * wer_swapped:.0f} % ({'above' if reads else 'not above'} "
        f"{100 * GATE_WER:.0f} %)"
    )
    return {
        "nll_intact": float(own.sum() / below.sum()),
        "nll_swapped": float(other.sum() / below.sum()),
        "nll_gap_ci": gap.limits,
        "wer_swapped": wer_swapped,
        "passed": bool(hears and reads),
        "reason": reason,
    }
