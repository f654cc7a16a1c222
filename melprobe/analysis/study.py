"""What a layer study is: clips, the blocks that are cut, and batches that fit into memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from melprobe.analysis.question import Question
from melprobe.analysis.wer import normalise
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.hooks.parts import Part, Target
from melprobe.listener import Listener
from melprobe.model.inference import batches_by_length
from melprobe.model.memory import study_bytes
from melprobe.model.prompts import Given


@dataclass(frozen=True, slots=True)
class LayerStudy:
    """What is cut, how and where, and on which clips."""

    run: str
    utterances: Sequence[Utterance]
    given: Sequence[Given]
    """their waves (float32, mono, 16 kHz), or in place of them their texts"""
    partners: Sequence[int]
    """for each clip, the one that the model is given when swapped"""
    question: Question
    targets: Sequence[Target]
    """what is cut in turn"""
    max_new_tokens: int
    memory_mb: int = 2000
    """for what batches hold, beside the weights: half for clips, half for decoding variants"""
    means: Mapping[Part, Tensor] = field(default_factory=dict)
    """of parts that are replaced by them; see `with_means`"""

    @property
    def parts(self) -> set[Part]:
        """All parts that it replaces."""
        return {part for target in self.targets for part in self.question.parts(target)}

    def batches(self, listener: Listener) -> list[list[int]]:
        """Clips of like length together, as many as the memory allows.

        UsageError when one of them doesn't fit alone.
        """
        sizes = [
            clip_bytes(listener, given, u.text, self.max_new_tokens, self.question.cut == "patch")
            for u, given in zip(self.utterances, self.given, strict=True)
        ]
        most = self.memory_mb * 500_000
        if max(sizes) > most:
            u = self.utterances[sizes.index(max(sizes))]
            raise UsageError(
                f"{u.place}: takes {max(sizes) / 1e6:.0f} MB in a study, and there are "
                f"{most / 1e6:g} for clips (half of --memory {self.memory_mb}): give more memory "
                "or cut it"
            )
        return list(batches_by_length(sizes, most))

    def of(self, places: Sequence[int]) -> "LayerStudy":
        """The same on some of the clips, which are swapped among themselves."""
        utterances = [self.utterances[i] for i in places]
        return replace(
            self,
            utterances=utterances,
            given=[self.given[i] for i in places],
            partners=swap_partners(utterances),
        )


def clip_bytes(
    listener: Listener, given: Given, text: str, max_new_tokens: int, gradients: bool = False
) -> int:
    """About what a clip takes in a batch; see `melprobe.model.memory.study_bytes`."""
    answers = len(listener.processor.answer_ids(plain_text(text))) + max_new_tokens
    positions = listener.positions(given, answers)
    return study_bytes(listener.model, positions, answers, gradients=gradients)


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
                "swapping needs two clips with different words; take more, or other data"
            )
        partners.append(other)
    return partners
