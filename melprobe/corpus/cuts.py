"""Utterances as lhotse cuts, for samplers that bucket by duration.

Made from the manifest alone: no audio file is opened, and every recording is entered as the 16 kHz
mono wave that `melprobe.audio.load.load_utterance` makes of it. So load audio with that function,
through the cut's id, and not with `cut.load_audio()`.
"""

from collections.abc import Iterable

from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment

from melprobe.audio.load import SAMPLE_RATE
from melprobe.corpus.manifest import Utterance


def to_cuts(utterances: Iterable[Utterance]) -> CutSet:
    """One cut per utterance, with its id, and a supervision with its text and speaker."""
    return CutSet.from_cuts([_cut(utterance) for utterance in utterances])


def _cut(utterance: Utterance) -> MonoCut:
    samples = max(1, round(utterance.duration * SAMPLE_RATE))
    seconds = samples / SAMPLE_RATE
    recording = Recording(
        id=utterance.id,
        sources=[AudioSource(type="file", channels=[0], source=str(utterance.audio))],
        sampling_rate=SAMPLE_RATE,
        num_samples=samples,
        duration=seconds,
    )
    said = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=seconds,
        text=utterance.text,
        speaker=utterance.speaker or None,
    )
    return MonoCut(
        id=utterance.id,
        start=0.0,
        duration=seconds,
        channel=0,
        recording=recording,
        supervisions=[said],
    )
