"""The stream of training batches: which clips, in which order, changed in which way.

Batch number n depends on the recipe and the seed alone, so a run that was killed goes on with the
very batches it would have had.
"""

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import BatchFeature

from melprobe.audio.augment import add_noise, change_speed, spec_augment, warp_frequency
from melprobe.corpus.cuts import to_cuts
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.model.processor import MelLLMProcessor
from melprobe.training.clips import Clip
from melprobe.training.distillation import teacher_inputs
from melprobe.training.frames import (
    LENGTH_STEP,
    UNKNOWN,
    phone_targets,
    token_targets,
    tokens_of_words,
)
from melprobe.training.processes import WHOLE, Share
from melprobe.training.recipe import Augment, Data, Stage

# It fears for memory; a manifest's worth of cuts is small.
warnings.filterwarnings("ignore", message="You are using DynamicBucketingSampler with an eagerly")


class BatchOrder(Sampler[tuple[int, list[str]]]):
    """(step, clip ids) from `start` on: shuffled buckets of like duration, stage by stage."""

    def __init__(self, clips: list[Clip], data: Data, seed: int, start: int = 0):
        self.cuts = to_cuts(replace(c.source, id=c.id, duration=c.duration) for c in clips)
        self.usable = {
            "text": {clip.id for clip in clips},
            "phones": {clip.id for clip in clips if clip.source.phones},
            "tokens": {clip.id for clip in clips if clip.source.phones and clip.words_are_timed()},
        }
        for number, stage in enumerate(data.stages):
            self._cuts_of(number, stage)
        self.data = data
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        batches = (
            batch
            for number, stage in enumerate(self.data.stages)
            for batch in islice(self._endless(number, stage), stage.steps)
        )
        return islice(enumerate(batches), self.start, None)

    def _cuts_of(self, number: int, stage: Stage) -> list[Cut]:
        """The clips that a stage may draw; UsageError if there are none."""
        shortest, longest, usable = stage.min_seconds, stage.max_seconds, self.usable[stage.learn]
        fitting = [cut for cut in self.cuts if shortest <= cut.duration <= longest]
        if cuts := [cut for cut in fitting if cut.id in usable]:
            if len(cuts) == 1:  # the sampler sorts them into buckets by length
                raise UsageError(f"data.stages.{number}: {cuts[0].id} is its only clip; give two")
            return cuts
        without = f", or none of them has times for {stage.learn}" if fitting else ""
        raise UsageError(
            f"data.stages.{number}: no training clip lasts {shortest} to {longest} s{without}"
        )

    def _endless(self, number: int, stage: Stage) -> Iterator[list[str]]:
        cuts = self._cuts_of(number, stage)
        for epoch in count():
            seed = self.seed + 7919 * number + epoch
            # The sampler shuffles a window of 20,000 cuts, within which corpora would come one
            # after another: so they are mixed before it sees them.
            mixed = CutSet.from_cuts(random.Random(seed).sample(cuts, len(cuts)))
            sampler = DynamicBucketingSampler(
                mixed,
                max_duration=stage.batch_seconds or self.data.batch_seconds,
                num_buckets=min(10, len(cuts)),
                shuffle=True,
                seed=seed,
                # Or it would take a share of its own where there are several processes.
                world_size=1,
                rank=0,
            )
            for batch in sampler:
                yield [cut.id for cut in batch]


class SpeechBatches(Dataset[tuple[int, BatchFeature]]):
    """Loads, augments and featurises a process' share of the clips of one step.

    frames: adds `frame_targets`; teacher: adds what a teacher hears of them (`teacher_inputs`).
    """

    def __init__(
        self,
        clips: list[Clip],
        processor: MelLLMProcessor,
        data: Data,
        augment: Augment,
        seed: int,
        *,
        frames: bool,
        teacher: MelLLMProcessor | None = None,
        share: Share = WHOLE,
    ):
        self.by_id = {clip.id: clip for clip in clips}
        self.processor = processor
        self.data = data
        self.augment = augment
        self.seed = seed
        self.frames = frames
        self.teacher = teacher
        self.share = share

    def __getitem__(self, key: tuple[int, list[str]]) -> tuple[int, BatchFeature]:
        step, ids = key
        places = self.share.places(len(ids))
        batch = self._make(step, [ids[i] for i in places], places)
        if self.share.idle(len(ids)):
            batch["idle"] = torch.tensor(True)
        return step, batch

    def _make(self, step: int, ids: list[str], places: list[int]) -> BatchFeature:
        """places: of `ids` in the whole batch, by which a clip is changed alike in any share."""
        rngs = [np.random.default_rng([self.seed, step, 2 + place]) for place in places]
        chosen = [self.by_id[i] for i in ids]
        texts = [plain_text(clip.text) for clip in chosen]
        if self._copies(step):
            return self.processor.reading()(texts, texts, pad_to_multiple_of=LENGTH_STEP)
        changed = map(self._change, (clip.wave() for clip in chosen), rngs)
        waves, speeds = zip(*changed, strict=True)
        batch = self.processor(waves, texts, pad_to_multiple_of=LENGTH_STEP)
        mel = batch["input_features"]
        if self.augment.frequency_warp != (1.0, 1.0):
            factors = np.array([rng.uniform(*self.augment.frequency_warp) for rng in rngs])
            extractor = self.processor.feature_extractor
            mel = warp_frequency(mel, factors, extractor.f_max, extractor.mel_scale)
        batch["input_features"] = spec_augment(
            mel,
            batch["feature_attention_mask"].sum(1),
            rngs,
            time_masks=self.augment.time_masks,
            time_mask_frames=self.augment.time_mask_frames,
            frequency_masks=self.augment.frequency_masks,
            frequency_mask_bins=self.augment.frequency_mask_bins,
        )
        if self.frames:
            batch.update(frame_targets(chosen, speeds, batch, self.processor))
        if self.teacher:
            batch.update(teacher_inputs(self.teacher, waves))
        return batch

    def _copies(self, step: int) -> bool:
        """Whether this step's texts are read; drawn apart from what changes the clips."""
        drawn = np.random.default_rng([self.seed, step, 1]).random()
        return self.data.stage_at(step).learn == "text" and drawn < self.data.copy_share

    def _change(self, wave: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """The wave as training hears it, and how much faster it is."""
        speed = rng.uniform(*self.augment.speed)
        wave = change_speed(wave, speed)
        if rng.random() < self.augment.noise_probability:
            wave = add_noise(wave, rng.uniform(*self.augment.noise_snr_db), rng)
        return wave, speed


def frame_targets(
    clips: Sequence[Clip],
    speeds: Sequence[float],
    batch: BatchFeature,
    processor: MelLLMProcessor,
) -> dict[str, Tensor]:
    """Of the clips of `batch`: `phone_targets` (B, P, slots) and `token_targets` (B, P).

    Unknown beyond a clip's end; see `melprobe.training.frames`.
    """
    counts = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
    blank, rate = processor.tokenizer.eos_token_id, processor.frames_per_patch
    phones, tokens = [], []
    for clip, speed, n in zip(clips, speeds, counts, strict=True):
        answer = tokens_of_words(processor.tokenizer, plain_text(clip.text))
        phones.append(phone_targets(clip.source.phones, n, rate, clip.start, speed))
        tokens.append(token_targets(clip.words(), answer, blank, n, rate, clip.start, speed))
    return {
        "phone_targets": pad_sequence(phones, batch_first=True, padding_value=UNKNOWN),
        "token_targets": pad_sequence(tokens, batch_first=True, padding_value=UNKNOWN),
    }


def speech_loader(
    order: BatchOrder, batches: SpeechBatches, workers: int
) -> DataLoader[tuple[int, BatchFeature]]:
    """The batches of `order`, prepared ahead in `workers` processes."""
    return DataLoader(
        batches,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
