"""What a WER is held against: the same clips with others' audio, and what memory alone could do."""

import sys
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import extractOne

from melprobe.analysis.study import swap_partners
from melprobe.analysis.wer import corpus_wer, count_errors, normalise
from melprobe.corpus.manifest import Utterance
from melprobe.errors import UsageError
from melprobe.evaluation.rows import Batched, Row, make_rows
from melprobe.training.clips import load_corpora
from melprobe.training.recipe import SpeechRecipe


def partners_or_none(usable: list[Utterance]) -> list[int] | None:
    """Whose audio stands in for whose; None where no clip says anything else."""
    try:
        return swap_partners(usable)
    except UsageError as error:
        print(f"melprobe: no swapped control: {error}", file=sys.stderr)
        return None


def swapped_rows(
    usable: list[Utterance], waves: list[np.ndarray], partners: list[int], batched: Batched
) -> list[Row]:
    """One row an utterance, `text_of`, with the partner whose audio was heard in its place."""
    heard = [waves[i] for i in partners]
    rows = make_rows([usable[i] for i in partners], heard, *batched(heard))
    return [
        {**row, "text": u.text, "text_of": str(u.id)} for row, u in zip(rows, usable, strict=True)
    ]


def training_texts(checkpoint: Path) -> list[str]:
    """Distinct transcripts the checkpoint was trained on; none where a corpus is not built here.

    Those of the clips that training really read: without leaks, cut into words where it did.
    """
    try:
        recipe = SpeechRecipe.model_validate_json((checkpoint / "recipe.json").read_bytes())
        clips, _ = load_corpora(recipe.data)
    except (OSError, ValidationError, UsageError) as error:
        reason = str(error).splitlines()[0]
        print(
            f"melprobe: no nearest-transcript control, which needs the corpora of the training: "
            f"{reason}",
            file=sys.stderr,
        )
        return []
    return sorted({normalise(clip.text) for clip in clips})


def nearest_wer(utterances: list[Utterance], texts: list[str]) -> float:
    """WER of answering each utterance with the training transcript nearest to its reference."""
    pool = [text.split() for text in texts]
    answers = []
    for u in utterances:
        words = normalise(u.text).split()
        found = extractOne(words, pool, scorer=Levenshtein.distance, processor=None)
        answers.append(" ".join(found[0]))
    return corpus_wer(map(count_errors, (u.text for u in utterances), answers))
