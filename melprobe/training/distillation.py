"""Distillation: another model's residuals at speech positions as targets, after one block.

The teacher hears each clip as it is after changes of speed and noise, without the stripes and
warps that the student's spectrogram gets. Residuals are standardised over their width before they
are compared, so that the loss is 2 (1 - their correlation): a few large dimensions, which every
decoder has, would decide a plain distance.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from melprobe.errors import UsageError
from melprobe.model import checkpoint
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.processor import MelLLMProcessor
from melprobe.model.prompts import Wave
from melprobe.training.processes import Mean, own_mean
from melprobe.training.reading import Residual
from melprobe.training.recipe import Distillation

PREFIX = "teacher_"
_INPUTS = ("input_features", "feature_attention_mask")


class Teacher:
    """A trained model whose residuals a student, `model`, is to have as well."""

    def __init__(
        self,
        model: MelLLMForConditionalGeneration,
        processor: MelLLMProcessor,
        settings: Distillation,
    ):
        self.folder = checkpoint.find_checkpoint(settings.teacher)
        self.model, self.processor = checkpoint.load(self.folder)
        where = f"distil.teacher {self.folder}"
        for name in ("base_sha256", "frames_per_patch"):
            _check_alike(where, name, getattr(model.config, name), getattr(self.model.config, name))
        for name in ("before", "after"):
            _check_alike(where, name, getattr(processor, name), getattr(self.processor, name))
        self.model.requires_grad_(False)
        self.audio_token_id = model.config.audio_token_id
        self.student = Residual(model, settings.layer, "distil.layer")
        self.own = Residual(self.model, settings.layer, "distil.layer")

    def loss(
        self, batch: Mapping[str, Tensor], heard: Mapping[str, Tensor], mean: Mean = own_mean
    ) -> Tensor:
        """Mean over patches of the student's pass that just ran on `batch`.

        heard: what `teacher_inputs` made of the same clips.
        """
        speech = batch["input_ids"] == self.audio_token_id
        self.model.to(speech.device)
        words = {key: batch[key] for key in ("input_ids", "attention_mask")}
        features = {key.removeprefix(PREFIX): value for key, value in heard.items()}
        with torch.no_grad():
            wanted = self.own.of(self.model, {**words, **features})[speech]
        found = self.student.last()[speech]
        distance = F.mse_loss(_standardised(found), _standardised(wanted), reduction="sum")
        return mean(distance, found.numel())


def teacher_inputs(processor: MelLLMProcessor, waves: Sequence[Wave]) -> dict[str, Tensor]:
    """What the teacher hears of a batch of waves, under names of its own."""
    features, _ = processor.features(waves, processor.feature_extractor.sampling_rate)
    return {PREFIX + key: features[key] for key in _INPUTS}


def _standardised(residuals: Tensor) -> Tensor:
    return F.layer_norm(residuals.float(), residuals.shape[-1:])


def _check_alike(where: str, name: str, ours: object, its: object) -> None:
    """UsageError unless the teacher's patches stand where the student's do."""
    if ours != its:
        raise UsageError(f"{where}: {name} is {its!r} there and {ours!r} here")
