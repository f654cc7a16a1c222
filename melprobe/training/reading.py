"""Reading text from the middle of a decoder: residuals after one block, and tokens out of them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from melprobe.errors import UsageError
from melprobe.hooks.layers import block_input, decoder_blocks
from melprobe.model.modelling import MelLLMForConditionalGeneration


class _Enough(Exception):
    """Nobody needs the blocks above."""


class Residual:
    """The residual stream after block `layer` in the forward pass that ran last.

    It listens at the next block's entrance, so the last block can't be had. `field` is what the
    recipe calls the layer, for the UsageError.
    """

    def __init__(self, model: nn.Module, layer: int, field: str):
        blocks = decoder_blocks(model)
        if not 0 <= layer < len(blocks) - 1:
            raise UsageError(f"{field} {layer}: take a block from 0 to {len(blocks) - 2}")
        self.layer = layer
        self._kept: Tensor | None = None
        self._stop = False
        blocks[layer + 1].register_forward_pre_hook(self._listen, with_kwargs=True)

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kept = block_input(args, kwargs)
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
            model(**batch, use_cache=False)  # a cache is for blocks that run again
        except _Enough:
            pass
        finally:
            self._stop = False
        return self.last()


class TokenReader:
    """Tokens read from residuals as the decoder itself would: its final norm and embeddings.

    It adds no parameter, and pulls patches towards what the text they stand for looks like.
    token_ids: the tokens that training answers hold; only these are scored, and class 0, which is
    the end token and stands for none.
    """

    def __init__(
        self,
        model: MelLLMForConditionalGeneration,
        token_ids: Iterable[int],
        eos_token_id: int,
    ):
        self.model = model
        classes = [eos_token_id, *sorted(set(token_ids) - {eos_token_id})]
        self.classes = torch.tensor(classes)
        self._class_of = torch.zeros(max(classes) + 1, dtype=torch.long)
        self._class_of[self.classes] = torch.arange(len(classes))

    def scores(self, residual: Tensor) -> Tensor:
        """Log-probabilities (N, classes) from residuals (N, D)."""
        decoder: Any = self.model.get_decoder()
        rows = decoder.embed_tokens.weight[self.classes.to(residual.device)]
        hidden = decoder.norm(residual)
        return (hidden @ rows.to(hidden.dtype).T).float().log_softmax(-1)

    def classes_of(self, token_ids: Tensor) -> Tensor:
        """Class numbers of token ids."""
        return self._class_of.to(token_ids.device)[token_ids]
