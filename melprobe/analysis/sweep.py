"""The layer study: what each clip's transcript and likelihood become when blocks are cut.

Batch by batch, so that the intact model's logits (for KL) are held for one batch at a time, and
row by row into the store, so that a study which was stopped goes on.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from melprobe.analysis.study import LayerStudy
from melprobe.analysis.wer import count_errors
from melprobe.audio.augment import add_noise
from melprobe.hooks.parts import Part, Target, in_place, watch_means, watch_parts
from melprobe.hooks.patching import Entering
from melprobe.hooks.replay import Heard, Replay, Variant
from melprobe.listener import Listener
from melprobe.model.inference import kl_per_clip
from melprobe.store import Key, Row, RowStore


def run_layer_study(
    listener: Listener, study: LayerStudy, store: RowStore, advance: Callable[[int], None]
) -> None:
    """Fill `store` with the rows that are missing; `advance(n)` hears of each n rows done."""
    done = store.done()
    study = with_means(listener, study)
    for places in study.batches(listener):
        _fill(StudyBatch(listener, study, places), store, done, advance)


def with_means(listener: Listener, study: LayerStudy) -> LayerStudy:
    """The study, with the mean contributions over its clips if it replaces parts by them."""
    question = study.question
    if question.by != "mean" or study.means:
        return study
    with watch_means(listener.model, study.parts, question.positions) as means:
        for places in study.batches(listener):
            texts = [study.utterances[i].text for i in places]
            listener.score([study.given[i] for i in places], texts)
    return replace(study, means=means.values())


class StudyBatch:
    """Some clips of a study: heard intact, swapped, and all that a cut needs."""

    def __init__(
        self,
        listener: Listener,
        study: LayerStudy,
        places: Sequence[int],
        max_new_tokens: int | None = None,
    ):
        """max_new_tokens: the study's when not given."""
        self.listener, self.study = listener, study
        self.max_new_tokens = study.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.utterances = [study.utterances[i] for i in places]
        self.texts = [u.text for u in self.utterances]
        self._given = [study.given[i] for i in places]
        self._swapped = [study.given[study.partners[i]] for i in places]

    @cached_property
    def replay(self) -> Replay:
        return self.listener.replay(self._given, self.texts, self.max_new_tokens)

    @cached_property
    def swapped(self) -> Replay:
        """Each clip's text when the model is given its partner."""
        return self.listener.replay(self._swapped, self.texts, self.max_new_tokens)

    def variant(self, target: Target) -> Variant:
        """This cut, as the study cuts."""
        question, listener, layers = self.study.question, self.listener, target.layers
        lowest = min(layers)
        where = question.positions
        match question.cut:
            case "skip":
                # It changes what the block hands on, but not what the block computes.
                return Variant(partial(listener.skip, layers, where), lowest + 1)
            case "knock-out":
                readers, beyond = question.readers or None, question.beyond
                out = partial(listener.knock_out, layers, where, readers, beyond)
                return Variant(out, lowest)
            case "bypass":
                return Variant(partial(listener.bypass, layers, where), lowest)
            case "no-attention" | "no-mlp" | "no-head":
                parts = question.parts(target)
                ablated = partial(listener.ablate, parts, where, self._values(parts))
                return Variant(ablated, lowest)
            case "patch":
                entering = {layer: self._of_others[layer] for layer in layers}
                return Variant(partial(listener.patch, entering, where), lowest)
            case "without-lora":
                return Variant(partial(listener.without_lora, layers, where), lowest)

    def _values(self, parts: Sequence[Part]) -> dict[Part, Tensor]:
        """What stands in the place of what parts contribute."""
        match self.study.question.by:
            case "mean":
                return {part: self.study.means[part] for part in parts}
            case "resample":
                where = self.replay.where(self.study.question.positions)
                return {part: in_place(self._of_partners[part], where) for part in parts}
        return {}

    @cached_property
    def _other_waves(self) -> list[np.ndarray]:
        """What the run hears that patches come from: as long as each clip."""
        waves = [np.asarray(wave) for wave in self._given]  # texts are not patched
        if self.study.question.by == "resample":
            pairs = zip(waves, self._swapped, strict=True)
            return [np.resize(other, len(wave)) for wave, other in pairs]
        snr_db = self.study.question.source_noise_db
        # Seeded by the clip, so that a study that goes on meets the same noise.
        return [
            add_noise(wave, snr_db, np.random.default_rng(zlib.crc32(u.id.encode())))
            for wave, u in zip(waves, self.utterances, strict=True)
        ]

    @cached_property
    def _of_others(self) -> Entering:
        """What enters each block in that run."""
        return self.listener.entering(self._other_waves, self.study.question.positions)

    @cached_property
    def attribution(self) -> Tensor:
        """(L, B) change of each clip's NLL under a patch of each block, to first order, nat."""
        positions = self.study.question.positions
        waves = (self._other_waves, self._given)  # here the run that is patched is the clean one
        return self.listener.attribution(*waves, self.texts, positions)

    @cached_property
    def _of_partners(self) -> dict[Part, list[Tensor]]:
        """What all parts contribute to the partners' clips."""
        question, model = self.study.question, self.listener.model
        inputs = self.listener.processor(self._swapped).to(model.device)
        with torch.no_grad(), watch_parts(model, self.study.parts, question.positions) as seen:
            model(**inputs, logits_to_keep=1)
        return seen


def _fill(
    batch: StudyBatch, store: RowStore, done: set[Key], advance: Callable[[int], None]
) -> None:
    """Store the rows of a batch that are missing."""
    study, cut = batch.study, batch.study.question.cut
    targets = {target.label: target for target in study.targets}
    conditions = [("intact", ""), ("swapped", ""), *((cut, label) for label in targets)]
    missing = [
        condition
        for condition in conditions
        if any(Key(study.run, *condition, u.id) not in done for u in batch.utterances)
    ]
    advance(len(batch.utterances) * (len(conditions) - len(missing)))
    if not missing:
        return
    change = batch.replay.block_change(study.question.positions)

    def keep(condition: str, label: str, heard: Heard) -> None:
        rows = make_rows(batch, condition, label, heard, _beside(batch, label, change))
        store.add(rows)
        advance(len(rows))

    if ("intact", "") in missing:
        keep("intact", "", batch.replay.intact)
    if ("swapped", "") in missing:
        kl = kl_per_clip(batch.replay.scores, batch.swapped.scores)
        keep("swapped", "", replace(batch.swapped.intact, kl=kl))
        del batch.swapped  # its logits are as large as all the rest
    cuts = [label for condition, label in missing if condition == cut]
    variants = (batch.variant(targets[label]) for label in cuts)
    heards = batch.replay.hear_each(variants, study.memory_mb // 2)
    for label, heard in zip(cuts, heards, strict=True):
        keep(cut, label, heard)


def make_rows(
    batch: StudyBatch,
    condition: str,
    label: str,
    heard: Heard,
    beside: Mapping[str, Tensor],
) -> list[Row]:
    """Of each clip of the batch; beside: (B,) of each score that needs no cut."""
    answers = batch.listener.processor.batch_decode(heard.answers)
    rows = []
    for i, (u, hypothesis) in enumerate(zip(batch.utterances, answers, strict=True)):
        errors = count_errors(u.text, hypothesis)
        rows.append(
            Row(
                run=batch.study.run,
                condition=condition,
                layer=label,
                utterance=u.id,
                positions=batch.study.question.positions if label else "",
                speaker="" if batch.study.question.copy_text else u.speaker,
                nll=heard.nll[i].item(),
                answer_tokens=int(heard.tokens[i]),
                kl=heard.kl[i].item(),
                reference=u.text,
                hypothesis=hypothesis,
                substitutions=errors.substitutions,
                deletions=errors.deletions,
                insertions=errors.insertions,
                reference_words=errors.reference_words,
                seconds=heard.seconds / len(answers),
                **{name: values[i].item() for name, values in beside.items()},
            )
        )
    return rows


def _beside(
    batch: StudyBatch, label: str, change: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """What can be said of a single block without cutting it, (B,); a set of blocks has none."""
    if not label.isdecimal():
        return {}
    cosine, angle = change[int(label)]
    found = {"block_influence": 1 - cosine, "angular_distance": angle}
    if batch.study.question.cut == "patch":
        found["attribution"] = batch.attribution[int(label)]
    return found
