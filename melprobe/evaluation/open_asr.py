"""The Open ASR Leaderboard as its code has it: sets, file names, which references count.

From the repository huggingface/open_asr_leaderboard, files at the commits named below. Of its two
generations the scores are the same: text and transcript go through the Whisper English normaliser
before they are written, WER is jiwer's over all words of a set, the mean over sets is a plain one,
and RTFx is all audio over all time.

Not here: what the board has measured since July 2026 (AMI, GigaSpeech, VoxPopuli cleaned, then
Earnings-22 in chunks and Voice Arena Monsoon). That scores otherwise: written rows are raw, the
normaliser has new rules for names and compounds, and a compound written in two words is no error
(normalizer/eval_utils.py at 00cbc7d). What could not be looked at is the data itself: that every
set's columns are `audio` and `text` is as others report it.
"""

import re
from typing import NamedTuple

from melprobe.analysis.wer import whisper_normalise


class SetName(NamedTuple):
    """One set of the leaderboard: a data set of the hub, its configuration, and a split."""

    dataset: str
    config: str
    split: str

    @property
    def label(self) -> str:
        return f"{self.config} {self.split}"


_TESTS = (
    ("ami", "test"),
    ("earnings22", "test"),
    ("gigaspeech", "test"),
    ("librispeech", "test.clean"),
    ("librispeech", "test.other"),
    ("spgispeech", "test"),
    ("tedlium", "test"),
    ("voxpopuli", "test"),
)
GENERATIONS = {
    # transformers/run_whisper.sh at 007271d: eight sets
    "2025": tuple(SetName("hf-audio/esb-datasets-test-only-sorted", *test) for test in _TESTS),
    # transformers/submit_jobs_whisper.sh at 2a08276: TED-LIUM was dropped in May 2026
    "2026": tuple(
        SetName("hf-audio/open-asr-leaderboard", *test) for test in _TESTS if test[0] != "tedlium"
    ),
}
LATEST = "2026"

normalise = whisper_normalise
"""Not `melprobe.analysis.wer.normalise`, which mends what the leaderboard leaves as it is."""


def counts(reference: str) -> bool:
    """Whether a normalised reference is scored (normalizer/data_utils.py at 02fc5fb)."""
    return reference.strip() not in ("", "ignore time segment in scoring")


def rows_name(checkpoint: str, test_set: SetName) -> str:
    """The file name that its scorer takes apart again (`write_manifest` in eval_utils.py).

    A model there is AUTHOR/NAME, and the scorer splits at the first hyphen.
    """
    model = re.sub(r"[^\w.-]+", "-", checkpoint.strip("/"))
    dataset, config = (part.replace("/", "-") for part in test_set[:2])
    return f"MODEL_melprobe-{model}_DATASET_{dataset}_{config}_{test_set.split}.jsonl"
