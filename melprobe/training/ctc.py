"""CTC on speech positions: a warm-up that teaches the lower blocks to hear in order.

Next-token training has to find out by itself which patch each word came from; CTC (Graves et al.
2006) only asks that the words appear in their order. It reads the residual after one block
through the decoder's own final norm and token embeddings, so it adds no parameter and pulls
patches towards what the text they stand for looks like. The end token is the blank.

It shapes which blocks hear: a checkpoint trained with it says so, and after which block.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchFeature

from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.training.residual import Residual


class SpeechCTC:
    """The CTC loss of a Mel-LLM's speech positions after block `layer`.

    token_ids: the tokens that training answers hold; logits are computed for these alone.
    """

    def __init__(
        self,
        model: MelLLMForConditionalGeneration,
        layer: int,
        token_ids: Iterable[int],
        eos_token_id: int,
    ):
        self.model = model
        self.residual = Residual(model, layer)
        classes = [eos_token_id, *sorted(set(token_ids) - {eos_token_id})]
        self.classes = torch.tensor(classes)
        self.class_of = torch.zeros(max(classes) + 1, dtype=torch.long)
        self.class_of[self.classes] = torch.arange(len(classes))

    def loss(self, batch: BatchFeature) -> Tensor:
        """Nat per answer token, of the forward pass that just ran on `batch`."""
        labels = batch["labels"]
        speech = batch["input_ids"] == self.model.config.audio_token_id  # (B, S)
        lengths = speech.sum(1)
        decoder: Any = self.model.get_decoder()
        rows = decoder.embed_tokens.weight[self.classes.to(labels.device)]
        hidden = decoder.norm(self.residual.last()[speech])
        scores = (hidden @ rows.to(hidden.dtype).T).float().log_softmax(-1)  # (patches, classes)
        padded = nn.utils.rnn.pad_sequence(scores.split(lengths.tolist()))  # (P, B, classes)
        words = (labels != -100) & (labels != self.classes[0])
        targets = self.class_of.to(labels.device)[labels[words]]
        # A clip with more tokens than patches can't be aligned and counts nothing.
        return F.ctc_loss(padded, targets, lengths, words.sum(1), blank=0, zero_infinity=True)
