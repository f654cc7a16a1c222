"""The speech task: a Mel-LLM that learns to write down what it reads off a spectrogram."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature

from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.audio.load import load_utterance
from melprobe.audio.mel import MelSettings, log_mel
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.text import plain_text
from melprobe.model import checkpoint
from melprobe.model.inference import answer_scores, transcribe
from melprobe.model.processor import MelLLMFeatureExtractor
from melprobe.training.ctc import SpeechCTC
from melprobe.training.data import (
    Clip,
    batch_phone_targets,
    dev_clips,
    load_corpora,
    speech_loader,
)
from melprobe.training.phones import PhoneHead
from melprobe.training.recipe import SpeechRecipe
from melprobe.training.residual import Residual

# Longer answers don't occur in the corpora's short clips; a looping model is cut here.
_MAX_NEW_TOKENS = 40


class SpeechTask:
    """A Mel-LLM, its training batches and its development clips."""

    def __init__(self, recipe: SpeechRecipe):
        self.recipe = recipe
        settings = recipe.model
        extractor = MelLLMFeatureExtractor(
            f_max=settings.f_max, normalisation=settings.normalisation
        )
        torch.manual_seed(recipe.seed)
        self.clips, self.dropped = load_corpora(recipe.data)
        if settings.normalisation == "global":
            extractor.mean, extractor.std = mel_statistics(self.clips, settings.f_max, recipe.seed)
        self.model, self.processor = checkpoint.create(
            settings.base,
            extractor,
            prompt=settings.prompt,
            lora=settings.lora.to_peft() if settings.lora else None,
            audio_front=settings.front,
            frames_per_patch=settings.frames_per_patch,
            conv_channels=settings.conv_channels,
            audio_attention=settings.audio_attention,
        )
        if settings.init:
            start = checkpoint.find_checkpoint(settings.init)
            checkpoint.load_adapter_state(self.model, checkpoint.read_adapter(start), str(start))
        if recipe.precision == "bf16" and settings.lora:
            _frozen_linears_to_bf16(self.model)
        self.ctc = self._make_ctc(recipe.ctc.layer) if recipe.ctc else None
        self.heads = nn.ModuleDict()
        if recipe.phones:
            width = self.model.config.text_config.hidden_size
            self.heads["phones"] = PhoneHead(width, settings.frames_per_patch)
            self.residual = Residual(self.model, recipe.phones.layer)
        self.dev = {
            name: [(u, load_utterance(u)) for u in clips]
            for name, clips in dev_clips(recipe.data.dev, recipe.data.dev_clips).items()
        }

    def batches(self, start: int) -> Iterable[tuple[int, BatchFeature]]:
        recipe = self.recipe
        return speech_loader(
            self.clips,
            self.processor,
            recipe.data,
            recipe.augment,
            recipe.seed,
            start,
            phones=recipe.phones is not None,
        )

    def losses(self, model: Any, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Next-token loss of the answers, and beside it CTC and phones as the recipe asks."""
        recipe, losses = self.recipe, {}
        targets = batch.pop("phone_targets", None)
        if recipe.stage_at(step).learn == "phones":
            residual = self.residual.of(model, _speech_only(batch, self.processor.audio_token_id))
            losses["train_loss"], losses["phone_accuracy"] = self._phones(residual, batch, targets)
            return losses
        losses["train_loss"] = losses["nll"] = model(**batch).loss
        if self.ctc and recipe.ctc and step < recipe.ctc.steps:
            losses["ctc"] = self.ctc.loss(batch)
            losses["train_loss"] = losses["train_loss"] + recipe.ctc.weight * losses["ctc"]
        if recipe.phones and recipe.phones.weight:
            losses["phones"], losses["phone_accuracy"] = self._phones(
                self.residual.last(), batch, targets
            )
            losses["train_loss"] = losses["train_loss"] + recipe.phones.weight * losses["phones"]
        return losses

    def _phones(
        self, residual: Tensor, batch: Mapping[str, Tensor], targets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"][:, : residual.shape[1]]
        return self.heads["phones"](residual, ids == self.processor.audio_token_id, targets)

    def _make_ctc(self, layer: int) -> SpeechCTC:
        texts = {plain_text(clip.text) for clip in self.clips}
        tokens = {token for text in texts for token in self.processor.answer_ids(text)}
        return SpeechCTC(self.model, layer, tokens, self.processor.tokenizer.eos_token_id)

    def evaluate(self, step: int) -> dict[str, float]:
        """Per dev manifest: NLL per answer token, the same with another clip's audio, and WER.

        Where phones are learnt, the share of them that is right (clips with phone times).
        """
        measured: dict[str, float] = {}
        if self.recipe.phones:
            for name, clips in self.dev.items():
                measured[f"{name}:phone_accuracy"] = self._phone_accuracy(clips)
        if self.recipe.stage_at(step).learn == "phones":
            return measured
        losses = []
        for name, clips in self.dev.items():
            waves, texts = [wave for _, wave in clips], [u.text for u, _ in clips]
            targets = [plain_text(t) for t in texts]
            intact = answer_scores(self.model, self.processor, waves, targets)
            swapped = answer_scores(self.model, self.processor, waves[1:] + waves[:1], targets)
            tokens = intact.tokens.sum()
            heard = transcribe(self.model, self.processor, waves, _MAX_NEW_TOKENS)
            errors = [count_errors(t, h) for t, h in zip(texts, heard, strict=True)]
            losses.append((intact.nll.sum() / tokens).item())
            measured[f"{name}:nll"] = losses[-1]
            measured[f"{name}:nll_swapped"] = (swapped.nll.sum() / tokens).item()
            measured[f"{name}:wer"] = corpus_wer(errors)
        return {"dev_loss": sum(losses) / len(losses), **measured}

    @torch.no_grad()
    def _phone_accuracy(self, clips: Sequence[tuple[Utterance, np.ndarray]]) -> float:
        timed = [(Clip(u.id, u, u.text, 0.0, u.duration), wave) for u, wave in clips if u.phones]
        if not timed:
            return math.nan
        batch = self.processor([wave for _, wave in timed], ["" for _ in timed])
        targets = batch_phone_targets(
            [c for c, _ in timed], [1.0] * len(timed), batch, self.processor
        )
        on_device = {key: value.to(self.model.device) for key, value in batch.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16):
            residual = self.residual.of(self.model, on_device)
            return self._phones(residual, on_device, targets.to(self.model.device))[1].item()

    def save(self, folder: Path, log: list[dict[str, Any]]) -> None:
        checkpoint.save(self.model, self.processor, folder)
        (folder / "recipe.json").write_text(self.recipe.model_dump_json(indent=2) + "\n")
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        data = {
            "manifests": [corpus.model_dump() for corpus in self.recipe.data.train],
            "dropped_as_leaks": self.dropped,
            "clips_per_epoch": len(self.clips),
            "hours_per_epoch": round(sum(clip.duration for clip in self.clips) / 3600, 2),
            "speakers": len({clip.source.speaker for clip in self.clips}),
        }
        (folder / "data.json").write_text(json.dumps(data, indent=2) + "\n")


def _speech_only(batch: Mapping[str, Tensor], audio_token_id: int) -> dict[str, Tensor]:
    """`batch` without labels, cut behind the last patch of its longest clip."""
    patches = (batch["input_ids"] == audio_token_id).any(0).nonzero()
    kept = {key: value for key, value in batch.items() if key != "labels"}
    for key in ("input_ids", "attention_mask"):
        kept[key] = kept[key][:, : int(patches.max()) + 1]
    return kept


def mel_statistics(
    clips: Sequence[Clip], f_max: float, seed: int, most: int = 500
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each mel bin over at most `most` training clips."""
    chosen = np.random.default_rng(seed).permutation(len(clips))[:most]
    settings = MelSettings(f_max=f_max)
    frames = [log_mel(torch.from_numpy(clips[i].wave())[None], settings)[0] for i in chosen]
    std, mean = torch.std_mean(torch.cat(frames), dim=0, correction=0)
    return mean.tolist(), std.clamp(min=1e-2).tolist()


def _frozen_linears_to_bf16(model: nn.Module) -> None:
    """Hold frozen matrices in the precision that autocast would cast them to at every step."""
    for name, module in model.named_modules():
        # lm_head is tied to the embedding, which stays float32.
        frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
        if frozen and not name.endswith("lm_head"):
            module.to(torch.bfloat16)
