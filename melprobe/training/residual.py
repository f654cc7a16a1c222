"""What a block hands on during training, for losses that listen in the middle of the decoder."""

from typing import Any

from torch import Tensor, nn

from melprobe.hooks.layers import check_layers, decoder_blocks


class _Enough(Exception):
    """Nobody needs the blocks above."""


class Residual:
    """The residual stream after block `layer` in the forward pass that ran last.

    It listens at the next block's entrance, so the last block can't be had: UsageError.
    """

    def __init__(self, model: nn.Module, layer: int):
        blocks = decoder_blocks(model)
        check_layers([layer], len(blocks) - 1)
        self._kept: Tensor | None = None
        self._stop = False
        blocks[layer + 1].register_forward_pre_hook(self._listen, with_kwargs=True)

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kept = args[0] if args else kwargs["hidden_states"]
        if self._stop:
            raise _Enough

    def last(self) -> Tensor:
        """(B, S, D)."""
        if self._kept is None:
            raise RuntimeError("run the model first")
        return self._kept

    def of(self, model: Any, batch: Any) -> Tensor:
        """(B, S, D) for `batch`, without the work of the blocks above."""
        self._stop = True
        try:
            model(**batch)
        except _Enough:
            pass
        finally:
            self._stop = False
        return self.last()
