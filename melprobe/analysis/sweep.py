"""The layer study: what each clip's transcript and likelihood become when blocks are cut.

Batch by batch, so that the intact model's logits (for KL) are held for one batch at a time, and
row by row into the store, so that a study which was stopped goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from melprobe.analysis.question import Question
from melprobe.analysis.wer import count_errors, normalise
from melprobe.audio.mel import frame_count
from melprobe.audio.patches import patch_count
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.hooks.layers import format_layers
from melprobe.hooks.replay import Heard, Variant
from melprobe.listener import Listener
from melprobe.model.inference import batches_by_length, kl_per_clip
from melprobe.model.processor import MelLLMProcessor
from melprobe.store import Key, Row, RowStore

# What the prompt adds to a clip's patches, roughly, when batches are cut.
_PROMPT_POSITIONS = 12


@dataclass(frozen=True, slots=True)
class LayerStudy:
    """What is cut, how and where, and on which clips (waves are float32, mono, 16 kHz)."""

    run: str
    utterances: Sequence[Utterance]
    waves: Sequence[np.ndarray]
    partners: Sequence[int]
    """for each clip, the one whose audio it hears when swapped"""
    question: Question
    layer_sets: Sequence[Sequence[int]]
    max_new_tokens: int
    batch_positions: int = 2048
    """Padded sequence positions in a batch: bounds memory."""

    def batches(self, processor: MelLLMProcessor) -> list[list[int]]:
        """Clips of like length together, with room for prompt, reference and draft."""
        lengths = [
            patch_count(frame_count(len(wave)), processor.frames_per_patch)
            + _PROMPT_POSITIONS
            + len(processor.answer_ids(plain_text(u.text)))
            + self.max_new_tokens
            for u, wave in zip(self.utterances, self.waves, strict=True)
        ]
        return list(batches_by_length(lengths, self.batch_positions))

    def of(self, places: Sequence[int]) -> "LayerStudy":
        """The same on some of the clips, which swap their audio among themselves."""
        utterances = [self.utterances[i] for i in places]
        return replace(
            self,
            utterances=utterances,
            waves=[self.waves[i] for i in places],
            partners=swap_partners(utterances),
        )

    def variant(self, listener: Listener, layers: Sequence[int]) -> Variant:
        """These blocks cut, as the study cuts blocks."""
        cut, where, lowest = self.question.cut, self.question.positions, min(layers)
        match cut:
            case "skip":
                # It changes what the block hands on, but not what the block computes.
                return Variant(partial(listener.skip, layers, where), lowest + 1)
            case "knock-out":
                readers, beyond = self.question.readers or None, self.question.beyond
                out = partial(listener.knock_out, layers, where, readers, beyond)
                return Variant(out, lowest)
            case "bypass":
                return Variant(partial(listener.bypass, layers, where), lowest)
            case "without-lora":
                return Variant(partial(listener.without_lora, layers), lowest, by_position=False)


def swap_partners(utterances: Sequence[Utterance]) -> list[int]:
    """For each clip, another one of the most similar length that says something else.

    Raises UsageError when there is none.
    """
    durations = np.array([u.duration for u in utterances])
    said = [normalise(u.text) for u in utterances]
    partners = []
    for i, text in enumerate(said):
        nearest = np.argsort(np.abs(durations - durations[i]), kind="stable")
        other = next((int(j) for j in nearest if said[j] != text), None)
        if other is None:
            raise UsageError(
                f"{len(utterances)} clip{'s' * (len(utterances) > 1)} of {utterances[0].where}: "
                "swapping the audio needs two clips with different words; take more, or other data"
            )
        partners.append(other)
    return partners


def run_layer_study(
    listener: Listener, study: LayerStudy, store: RowStore, advance: Callable[[int], None]
) -> None:
    """Fill `store` with the rows that are missing; `advance(n)` hears of each n rows done."""
    done = store.done()
    for batch in study.batches(listener.processor):
        _Batch(listener, study, batch).fill(store, done, advance)


class _Batch:
    """One batch of clips under every condition."""

    def __init__(self, listener: Listener, study: LayerStudy, batch: list[int]):
        self.listener = listener
        self.study = study
        self.utterances = [study.utterances[i] for i in batch]
        self.waves = [study.waves[i] for i in batch]
        self.swapped_waves = [study.waves[study.partners[i]] for i in batch]
        self.texts = [u.text for u in self.utterances]

    def fill(self, store: RowStore, done: set[Key], advance: Callable[[int], None]) -> None:
        cut, positions = self.study.question.cut, self.study.question.positions
        sets = {format_layers(layers): layers for layers in self.study.layer_sets}
        conditions = [("intact", ""), ("swapped", ""), *((cut, label) for label in sets)]
        missing = [
            condition
            for condition in conditions
            if any(Key(self.study.run, *condition, u.id) not in done for u in self.utterances)
        ]
        advance(len(self.utterances) * (len(conditions) - len(missing)))
        if not missing:
            return
        limit = self.study.max_new_tokens
        replay = self.listener.replay(self.waves, self.texts, limit)
        change = replay.block_change(positions)

        def keep(condition: str, label: str, heard: Heard) -> None:
            rows = self._rows(condition, label, heard, _turned(change, label))
            store.add(rows)
            advance(len(rows))

        if ("intact", "") in missing:
            keep("intact", "", replay.intact)
        if ("swapped", "") in missing:
            swapped = self.listener.replay(self.swapped_waves, self.texts, limit)
            kl = kl_per_clip(replay.scores, swapped.scores)
            keep("swapped", "", replace(swapped.intact, kl=kl))
        cuts = [label for condition, label in missing if condition == cut]
        variants = (self.study.variant(self.listener, sets[label]) for label in cuts)
        for label, heard in zip(cuts, replay.hear_each(variants), strict=True):
            keep(cut, label, heard)

    def _rows(
        self,
        condition: str,
        label: str,
        heard: Heard,
        turned: tuple[Tensor, Tensor] | None,
    ) -> list[Row]:
        answers = self.listener.processor.batch_decode(heard.answers)
        rows = []
        for i, (u, hypothesis) in enumerate(zip(self.utterances, answers, strict=True)):
            errors = count_errors(u.text, hypothesis)
            rows.append(
                Row(
                    run=self.study.run,
                    condition=condition,
                    layer=label,
                    utterance=u.id,
                    positions=self.study.question.positions if label else "",
                    speaker=u.speaker,
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
                    block_influence=1 - turned[0][i].item() if turned else None,
                    angular_distance=turned[1][i].item() if turned else None,
                )
            )
        return rows


def _turned(change: list[tuple[Tensor, Tensor]], label: str) -> tuple[Tensor, Tensor] | None:
    """(B,) cosine and angle of a single block; a set of blocks has none."""
    return change[int(label)] if label.isdecimal() else None
