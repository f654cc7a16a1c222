"""The stream of training batches: which clips, in which order, changed in which way.

Batch number n depends on the recipe and the seed alone, so a run that was killed goes on with the
very batches it would have had.
"""

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from zlib import crc32

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
from melprobe.audio.load import SAMPLE_RATE, load_utterance
from melprobe.corpus.cuts import to_cuts
from melprobe.corpus.leakage import without_leaks
from melprobe.corpus.manifest import Span, Utterance, find_manifest, read_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.model.processor import MelLLMProcessor
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

_MARGIN = 0.04  # seconds left around words that are cut out: their edges are not that sharp


@dataclass(frozen=True, slots=True)
class Clip:
    """What training reads as one example: a recording, or a few words cut out of one."""

    id: str
    """Unique in the run, also when a corpus is read several times."""
    source: Utterance
    text: str
    start: float
    """Seconds into the recording."""
    duration: float

    def wave(self) -> np.ndarray:
        """Samples of the clip (N,), 16 kHz."""
        wave = load_utterance(self.source)
        start = round(self.start * SAMPLE_RATE)
        return wave[start : start + round(self.duration * SAMPLE_RATE)]

    def words(self) -> list[Span]:
        """When its words are said, in seconds of the recording; empty where that is unknown."""
        end = self.start + self.duration
        return [w for w in self.source.words if self.start <= (w.start + w.end) / 2 <= end]

    def words_are_timed(self) -> bool:
        """Whether it is known when each word of the text is said."""
        return len(self.words()) == len(plain_text(self.text).split())


def load_corpora(data: Data) -> tuple[list[Clip], dict[str, int]]:
    """Training clips, and how many utterances each corpus lost to the leak check.

    An utterance is dropped when its text is near-equal to one in any dev or test manifest.
    """
    held_out = [u for name in (*data.dev, *data.test) for u in read_manifest(find_manifest(name))]
    corpora = {c.manifest: read_manifest(find_manifest(c.manifest)) for c in data.train}
    # All corpora at once: a chain of near-equal texts may run from one through another.
    kept, _ = without_leaks([u for corpus in corpora.values() for u in corpus], held_out)
    clean = {u.audio for u in kept}
    clips: list[Clip] = []
    dropped: dict[str, int] = {}
    for number, corpus in enumerate(data.train):
        usable = [u for u in corpora[corpus.manifest] if u.audio in clean]
        dropped[corpus.manifest] = len(corpora[corpus.manifest]) - len(usable)
        usable = [u for u in usable if _lot(u) < corpus.share]
        if corpus.crop_words:  # the aligner refuses a clip in a hundred
            usable = [u for u in usable if u.words]
            if not usable:
                raise UsageError(
                    f"data.train.{number}: crop_words needs word times, and no clip of "
                    f"{corpus.manifest} has any; see `python -m melprobe.corpus align`"
                )
        for copy in range(corpus.repeat):
            for u in usable:
                clips += _clips(u, f"{number}:{copy}:{u.id}", corpus.crop_words)
    # A word or two cut out of a clean sentence may be the whole of a test's.
    pieces, _ = without_leaks([replace(c.source, id=c.id, text=c.text) for c in clips], held_out)
    clean_ids = {u.id for u in pieces}
    clips = [clip for clip in clips if clip.id in clean_ids]
    if not clips:
        raise UsageError("data.train: no utterance is left after the leak check")
    return clips, dropped


def _lot(u: Utterance) -> float:
    """A number from 0 to 1 that an utterance drew for good."""
    return crc32(str(u.id).encode()) / 2**32


def _clips(u: Utterance, name: str, crop_words: int | None) -> list[Clip]:
    """The utterance whole, or cut between words into pieces of `crop_words` words."""
    if crop_words is None:
        return [Clip(name, u, u.text, 0.0, u.duration)]
    clips = []
    for first in range(0, len(u.words), crop_words):
        piece = u.words[first : first + crop_words]
        start = max(0.0, piece[0].start - _MARGIN)
        seconds = min(u.duration, piece[-1].end + _MARGIN) - start
        if seconds <= 0:
            raise UsageError(f"{u.where}: words: {piece[0].label!r} is said after the clip's end")
        text = " ".join(word.label for word in piece)
        clips.append(Clip(f"{name}@{first}", u, text, start, seconds))
    return clips


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


def dev_clips(names: tuple[str, ...], per_manifest: int) -> dict[str, list[Utterance]]:
    """The same few clips of each dev manifest every time, spread evenly over it."""
    chosen = {}
    for name in names:
        utterances = read_manifest(find_manifest(name))
        places = np.linspace(0, len(utterances) - 1, min(per_manifest, len(utterances)))
        chosen[name] = [utterances[int(i)] for i in places]
    return chosen
