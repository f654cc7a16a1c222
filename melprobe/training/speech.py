"""The speech task: a Mel-LLM that learns to write down what it reads off a spectrogram."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature

from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.audio.load import load_utterance
from melprobe.audio.mel import MelSettings, log_mel
from melprobe.corpus.text import plain_text
from melprobe.model import checkpoint
from melprobe.model.inference import answer_scores, transcribe
from melprobe.model.processor import MelLLMFeatureExtractor
from melprobe.training.ctc import SpeechCTC
from melprobe.training.data import Clip, dev_clips, load_corpora, speech_loader
from melprobe.training.recipe import SpeechRecipe

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
        self.dev = {
            name: [(load_utterance(u), u.text) for u in clips]
            for name, clips in dev_clips(recipe.data.dev, recipe.data.dev_clips).items()
        }

    def batches(self, start: int) -> Iterable[tuple[int, BatchFeature]]:
        recipe = self.recipe
        return speech_loader(
            self.clips, self.processor, recipe.data, recipe.augment, recipe.seed, start
        )

    def loss(self, model: Any, batch: BatchFeature, step: int) -> Tensor:
        """Next-token loss of the answers, and CTC beside it while the recipe asks for it."""
        loss = model(**batch).loss
        if self.ctc and self.recipe.ctc and step < self.recipe.ctc.steps:
            loss = loss + self.recipe.ctc.weight * self.ctc.loss(batch)
        return loss

    def _make_ctc(self, layer: int) -> SpeechCTC:
        texts = {plain_text(clip.text) for clip in self.clips}
        tokens = {token for text in texts for token in self.processor.answer_ids(text)}
        return SpeechCTC(self.model, layer, tokens, self.processor.tokenizer.eos_token_id)

    def evaluate(self) -> dict[str, float]:
        """Per dev manifest: NLL per answer token, the same with another clip's audio, and WER."""
        measured: dict[str, float] = {}
        losses = []
        for name, clips in self.dev.items():
            waves, texts = [w for w, _ in clips], [t for _, t in clips]
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
