"""The speech task: a Mel-LLM that learns to write down what it reads off a spectrogram."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature

from melprobe.analysis.study import swap_partners
from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.audio.load import load_utterance
from melprobe.audio.mel import MelSettings, log_mel
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.model import checkpoint
from melprobe.model.ancestry import write_ancestors
from melprobe.model.config import ENCODERS
from melprobe.model.encoder import EncoderStart, encoder_ears, resolve_encoder
from melprobe.model.inference import answer_scores, transcribe
from melprobe.model.processor import MelLLMFeatureExtractor
from melprobe.training.clips import Clip, dev_clips, load_corpora
from melprobe.training.ctc import SpeechCTC
from melprobe.training.data import BatchOrder, SpeechBatches, frame_targets, speech_loader
from melprobe.training.distillation import PREFIX, Teacher
from melprobe.training.frames import FrameLosses, check_phones
from melprobe.training.processes import WHOLE, Mean, Share, answer_loss
from melprobe.training.reading import Residual, TokenReader
from melprobe.training.recipe import Model, SpeechRecipe
from melprobe.training.start import inherited, take_over

# Longer answers don't occur in the corpora's short clips; a looping model is cut here.
_MAX_NEW_TOKENS = 40


class SpeechTask:
    """A Mel-LLM, its training batches and its development clips."""

    def __init__(self, recipe: SpeechRecipe):
        self.recipe = recipe
        settings = recipe.model
        extractor, encoder = _front_parts(settings)
        torch.manual_seed(recipe.seed)
        self.clips, self.dropped = load_corpora(recipe.data)
        self.order = BatchOrder(self.clips, recipe.data, recipe.seed)
        if settings.normalisation == "global":
            extractor.mean, extractor.std = mel_statistics(self.clips, settings.f_max, recipe.seed)
        self.model, self.processor = checkpoint.create(
            settings.base,
            extractor,
            prompt=settings.prompt,
            lora=settings.lora.to_peft() if settings.lora else None,
            encoder=encoder,
            audio_front=settings.front,
            frames_per_patch=settings.frames_per_patch,
            conv_channels=settings.conv_channels,
            audio_attention=settings.audio_attention,
        )
        self.ancestors = take_over(self.model, settings)
        self.learning = [name for name, p in self.model.named_parameters() if p.requires_grad]
        if recipe.precision == "bf16" and settings.lora:
            _frozen_linears_to_bf16(self.model)
        self.dev = {
            name: [(u, load_utterance(u)) for u in clips]
            for name, clips in dev_clips(recipe.data.dev, recipe.data.dev_clips).items()
        }
        self.partners = {name: _partners(name, clips) for name, clips in self.dev.items()}
        self.teacher: Teacher | None = None
        if recipe.distil:
            self.teacher = Teacher(self.model, self.processor, recipe.distil)
            self.ancestors += inherited(self.teacher.folder, "targets")
        self.heads: nn.Module = nn.Module()
        if recipe.ctc or recipe.frames:
            eos = self.processor.tokenizer.eos_token_id
            reader = TokenReader(self.model, self._answer_tokens(), eos)
        if recipe.ctc:
            self.ctc = SpeechCTC(reader, Residual(self.model, recipe.ctc.layer, "ctc.layer"))
        if recipe.frames:
            check_phones(clip.source for clip in self.clips)
            self.heads = self.frames = FrameLosses(self.model, reader, recipe.frames)

    def batches(self, start: int, share: Share = WHOLE) -> Iterable[tuple[int, BatchFeature]]:
        recipe = self.recipe
        _leave_cores_to(recipe.data.workers)
        self.order.start = start
        batches = SpeechBatches(
            self.clips,
            self.processor,
            recipe.data,
            recipe.augment,
            recipe.seed,
            frames=recipe.frames is not None,
            teacher=self.teacher.processor if self.teacher else None,
            share=share,
        )
        return speech_loader(self.order, batches, recipe.data.workers)

    def losses(
        self, model: Any, batch: dict[str, Tensor], step: int, mean: Mean
    ) -> dict[str, Tensor]:
        """Next-token loss of the answers, and beside it what else the recipe asks."""
        recipe, stage = self.recipe, self.recipe.data.stage_at(step)
        learn = stage.learn
        self._let_learn(stage.train)
        targets = {key: batch.pop(key) for key in list(batch) if key.endswith("_targets")}
        heard = {key: batch.pop(key) for key in list(batch) if key.startswith(PREFIX)}
        if learn != "text":
            batch = self.frames.run(model, batch, learn)
            losses = self.frames(batch, targets, tokens=learn == "tokens", mean=mean)
            return {"train_loss": losses.pop("frames"), **losses}
        if "input_features" not in batch:
            copied = answer_loss(model, batch, mean)
            return {"train_loss": copied, "copied": copied}
        losses = {"nll": answer_loss(model, batch, mean)}
        total = losses["nll"]
        if recipe.ctc and step < recipe.ctc.steps:
            losses["ctc"] = self.ctc.loss(batch, mean)
            total = total + recipe.ctc.weight * losses["ctc"]
        if recipe.distil and self.teacher and step < recipe.distil.steps:
            losses["distil"] = self.teacher.loss(batch, heard, mean)
            total = total + recipe.distil.weight * losses["distil"]
        if recipe.frames and recipe.frames.weight:
            losses |= self.frames(batch, targets, tokens=True, mean=mean)
            total = total + recipe.frames.weight * losses.pop("frames")
        return {"train_loss": total, **losses}

    def _let_learn(self, part: str) -> None:
        """Parameters that have no gradient are left alone by optimisers."""
        for name in self.learning:
            learns = part == "all" or name.startswith("audio_front.")
            self.model.get_parameter(name).requires_grad_(learns)

    def _answer_tokens(self) -> set[int]:
        heard = [clip.text for clip in self.clips]
        heard += [u.text for clips in self.dev.values() for u, _ in clips]
        texts = set(map(plain_text, heard))
        return {token for text in texts for token in self.processor.answer_ids(text)}

    def evaluate(self, step: int) -> dict[str, float]:
        """Per dev manifest: NLL per answer token, the same with another clip's audio, and WER.

        Where frames are learnt, what share of phones and tokens is right (clips with times).
        """
        measured: dict[str, float] = {}
        if self.recipe.frames:
            for name, clips in self.dev.items():
                right = self._frames_right(clips)
                measured |= {f"{name}:{key}": value for key, value in right.items()}
        if self.recipe.data.stage_at(step).learn != "text":
            return measured
        losses = []
        for name, clips in self.dev.items():
            waves, texts = [wave for _, wave in clips], [u.text for u, _ in clips]
            targets = [plain_text(t) for t in texts]
            intact = answer_scores(self.model, self.processor, waves, targets)
            others = [waves[i] for i in self.partners[name]]
            swapped = answer_scores(self.model, self.processor, others, targets)
            tokens = intact.tokens.sum()
            heard = transcribe(self.model, self.processor, waves, _MAX_NEW_TOKENS)
            errors = [count_errors(t, h) for t, h in zip(texts, heard, strict=True)]
            losses.append((intact.nll.sum() / tokens).item())
            measured[f"{name}:nll"] = losses[-1]
            measured[f"{name}:nll_swapped"] = (swapped.nll.sum() / tokens).item()
            measured[f"{name}:wer"] = corpus_wer(errors)
            if self.recipe.data.copy_share:
                read = answer_scores(self.model, self.processor.reading(), targets, targets)
                measured[f"{name}:nll_copied"] = (read.nll.sum() / tokens).item()
        return {"dev_loss": sum(losses) / len(losses), **measured}

    @torch.no_grad()
    def _frames_right(self, clips: Sequence[tuple[Utterance, np.ndarray]]) -> dict[str, float]:
        timed = [(Clip(u.id, u, u.text, 0.0, u.duration), wave) for u, wave in clips if u.words]
        if not timed:
            return {}
        batch = self.processor([wave for _, wave in timed], ["" for _ in timed])
        targets = frame_targets([c for c, _ in timed], [1.0] * len(timed), batch, self.processor)
        device = self.model.device
        inputs = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            inputs = self.frames.run(self.model, inputs, "tokens")
            losses = self.frames(
                inputs, {key: value.to(device) for key, value in targets.items()}, tokens=True
            )
        return {key: losses[key].item() for key in ("phones_right", "tokens_right")}

    def tensors(self) -> dict[str, Tensor]:
        return checkpoint.saved_tensors(self.model)

    def save(self, folder: Path, tensors: dict[str, Tensor], log: list[dict[str, Any]]) -> None:
        checkpoint.save(self.model, self.processor, folder, tensors=tensors)
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
        write_ancestors(folder, self.ancestors)


def _front_parts(settings: Model) -> tuple[MelLLMFeatureExtractor, EncoderStart | None]:
    """What makes the spectrogram, and the encoder that hears it, if there is one."""
    if settings.front not in ENCODERS:
        kind, f_max = settings.normalisation, settings.f_max
        return MelLLMFeatureExtractor(f_max=f_max, normalisation=kind), None
    encoder = settings.encoder
    start = EncoderStart(
        encoder.name, encoder.weights == "pretrained", encoder.train, encoder.conformer
    )
    return encoder_ears(resolve_encoder(encoder.name), settings.front), start


def _leave_cores_to(workers: int) -> None:
    """Threads that wait for a core which a worker has cost a third of the speed on two cores."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores - workers)))


def _partners(name: str, clips: Sequence[tuple[Utterance, np.ndarray]]) -> list[int]:
    """`swap_partners`, asked for before any training."""
    try:
        return swap_partners([u for u, _ in clips])
    except UsageError as error:
        raise UsageError(f"data.dev {name}, {len(clips)} of its clips: {error}") from None


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
