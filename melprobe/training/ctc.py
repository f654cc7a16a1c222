"""CTC on speech positions: a warm-up that teaches the lower blocks to hear in order.

Next-token training has to find out by itself which patch each word came from; CTC (Graves et al.
2006) only asks that the words appear in their order. It reads the residual after one block; the
end token is the blank. Where word times are known, `melprobe.training.frames` needs no search.

It shapes which blocks hear: a checkpoint trained with it says so, and after which block.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchFeature

from melprobe.training.processes import Mean, own_mean
from melprobe.training.reading import Residual, TokenReader


class SpeechCTC:
    """The CTC loss of a Mel-LLM's speech positions after the block that `residual` listens to."""

    def __init__(self, reader: TokenReader, residual: Residual):
        self.reader = reader
        self.residual = residual

    def loss(self, batch: BatchFeature, mean: Mean = own_mean) -> Tensor:
        """Nat per answer token, of the forward pass that just ran on `batch`."""
        labels = batch["labels"]
        speech = batch["input_ids"] == self.reader.model.config.audio_token_id  # (B, S)
        lengths = speech.sum(1)
        scores = self.reader.scores(self.residual.last()[speech])  # (patches, classes)
        padded = nn.utils.rnn.pad_sequence(scores.split(lengths.tolist()))  # (P, B, classes)
        words = (labels != -100) & (labels != self.reader.classes[0])
        targets = self.reader.classes_of(labels[words])
        # A clip with more tokens than patches can't be aligned and counts nothing.
        counts = words.sum(1)
        losses = F.ctc_loss(
            padded, targets, lengths, counts, blank=0, reduction="none", zero_infinity=True
        )
        return mean((losses / counts.clamp(min=1)).sum(), len(losses))
