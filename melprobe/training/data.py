"""The stream of training batches: which clips, in which order, changed in which way.

Batch number n depends on the recipe and the seed alone, so a run that was killed goes on with the
very batches it would have had.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

import numpy as np
from lhotse import CutSet
from lhotse.dataset import DynamicBucketingSampler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import BatchFeature

from melprobe.audio.augment import add_noise, change_speed, spec_augment
from melprobe.audio.load import load_utterance
from melprobe.corpus.cuts import to_cuts
from melprobe.corpus.leakage import without_leaks
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.model.processor import MelLLMProcessor
from melprobe.training.recipe import Augment, Data


def load_corpora(data: Data) -> tuple[list[Utterance], dict[str, int]]:
    """Training utterances with their repeats, and how many each corpus lost to the leak check.

    An utterance is dropped when its text is near-equal to one in any dev or test manifest.
    """
    held_out = [u for name in (*data.dev, *data.test) for u in read_manifest(find_manifest(name))]
    chosen: list[Utterance] = []
    dropped: dict[str, int] = {}
    for corpus in data.train:
        kept, leaks = without_leaks(read_manifest(find_manifest(corpus.manifest)), held_out)
        dropped[corpus.manifest] = len(leaks)
        for copy in range(corpus.repeat):
            chosen += [replace(u, id=f"{corpus.manifest}:{copy}:{u.id}") for u in kept]
    if not chosen:
        raise UsageError("data.train: no utterance is left after the leak check")
    return chosen, dropped


class BatchOrder(Sampler[tuple[int, list[str]]]):
    """(step, utterance ids) from `start` on: shuffled buckets of like duration, stage by stage."""

    def __init__(self, utterances: list[Utterance], data: Data, seed: int, start: int = 0):
        self.cuts = to_cuts(utterances)
        self.data = data
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        batches = (
            batch
            for number, stage in enumerate(self.data.stages)
            for batch in islice(self._endless(number, stage.max_seconds), stage.steps)
        )
        return islice(enumerate(batches), self.start, None)

    def _endless(self, stage: int, max_seconds: float) -> Iterator[list[str]]:
        # A list, so that every epoch shuffles the same order whatever was drawn before.
        cuts = CutSet.from_cuts([cut for cut in self.cuts if cut.duration <= max_seconds])
        if not len(cuts):
            raise UsageError(f"data.stages.{stage}: no training clip is under {max_seconds} s")
        for epoch in count():
            sampler = DynamicBucketingSampler(
                cuts,
                max_duration=self.data.batch_seconds,
                num_buckets=min(10, len(cuts)),
                shuffle=True,
                seed=self.seed + 7919 * stage + epoch,
            )
            for batch in sampler:
                yield [cut.id for cut in batch]


class SpeechBatches(Dataset[tuple[int, BatchFeature]]):
    """Loads, augments and featurises the clips of one step."""

    def __init__(
        self,
        utterances: list[Utterance],
        processor: MelLLMProcessor,
        augment: Augment,
        seed: int,
    ):
        self.by_id = {u.id: u for u in utterances}
        self.processor = processor
        self.augment = augment
        self.seed = seed

    def __getitem__(self, key: tuple[int, list[str]]) -> tuple[int, BatchFeature]:
        step, ids = key
        rng = np.random.default_rng([self.seed, step])
        chosen = [self.by_id[i] for i in ids]
        waves = [self._change(load_utterance(u), rng) for u in chosen]
        batch = self.processor(waves, [plain_text(u.text) for u in chosen])
        batch["input_features"] = spec_augment(
            batch["input_features"],
            batch["feature_attention_mask"].sum(1),
            rng,
            time_masks=self.augment.time_masks,
            time_mask_frames=self.augment.time_mask_frames,
            frequency_masks=self.augment.frequency_masks,
            frequency_mask_bins=self.augment.frequency_mask_bins,
        )
        return step, batch

    def _change(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        wave = change_speed(wave, rng.uniform(*self.augment.speed))
        if rng.random() < self.augment.noise_probability:
            wave = add_noise(wave, rng.uniform(*self.augment.noise_snr_db), rng)
        return wave


def speech_loader(
    utterances: list[Utterance],
    processor: MelLLMProcessor,
    data: Data,
    augment: Augment,
    seed: int,
    start: int,
) -> DataLoader[tuple[int, BatchFeature]]:
    """Endless-as-the-recipe batches from step `start` on."""
    return DataLoader(
        SpeechBatches(utterances, processor, augment, seed),
        sampler=BatchOrder(utterances, data, seed, start),
        batch_size=None,
        num_workers=data.workers,
        prefetch_factor=4 if data.workers else None,
    )


def dev_clips(names: tuple[str, ...], per_manifest: int) -> dict[str, list[Utterance]]:
    """The same few clips of each dev manifest every time, spread evenly over it."""
    chosen = {}
    for name in names:
        utterances = read_manifest(find_manifest(name))
        places = np.linspace(0, len(utterances) - 1, min(per_manifest, len(utterances)))
        chosen[name] = [utterances[int(i)] for i in places]
    return chosen
