"""Fitted maps between the residuals of two models, so that one can be patched with the other's.

Two models number their directions each in its own way, so a residual of one means nothing in the
other until a map is fitted. It is fitted on clips other than those that are patched: a map that has
seen them can carry over what the other model's residual doesn't hold.
"""

from collections.abc import Sequence

import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from melprobe.errors import UsageError


class ResidualMap:
    """An affine map from residuals (N, A) of one model to those (N, D) of another, by ridge."""

    def __init__(self, source: Sequence[Tensor], target: Sequence[Tensor], ridge: float = 1.0):
        """source, target: what entered a block of either at the same positions of the same clips.

        ridge: penalty on the weights' squares, beside squared errors. Raises UsageError where the
        positions differ in number, or are no more than the source has dimensions.
        """
        counts = [len(rows) for rows in source], [len(rows) for rows in target]
        if counts[0] != counts[1]:
            raise UsageError(
                f"the two models have {counts[0]} and {counts[1]} positions in these clips: a map "
                "needs one for one; take models with the same patch rate"
            )
        x, y = (torch.cat(list(part)).double().cpu() for part in (source, target))
        if len(x) <= x.shape[1]:
            raise UsageError(
                f"{len(x)} positions for a map from {x.shape[1]} dimensions: take more clips"
            )
        self._fit = Ridge(alpha=ridge).fit(x.numpy(), y.numpy())
        self.r2 = float(self._fit.score(x.numpy(), y.numpy()))
        """Explained variance on what it was fitted on, mean over dimensions."""

    def __call__(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The other model's residuals (N, D) of each clip, by those (N, A) of the one."""
        bias = torch.from_numpy(self._fit.intercept_)
        return [(self._turned(row) + bias).to(row) for row in rows]

    def change(self, rows: Tensor) -> Tensor:
        """What a change (N, A) of the one's residuals is in the other's, (N, D)."""
        return self._turned(rows).to(rows)

    def _turned(self, rows: Tensor) -> Tensor:
        return rows.double().cpu() @ torch.from_numpy(self._fit.coef_).T
