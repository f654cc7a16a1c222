"""What every measurement of a model has in common: which clips, answers how long."""

import numpy as np

from melprobe.corpus.manifest import Utterance
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.listener import Listener


def choose(utterances: list[Utterance], limit: int, seed: int) -> list[Utterance]:
    """`limit` utterances drawn without replacement, in the manifest's order."""
    if limit < 0:
        raise UsageError(f"--limit {limit}: take a number of utterances, or 0 for all")
    if seed < 0:
        raise UsageError(f"--seed {seed}: take 0 or a positive number")
    if not limit or limit >= len(utterances):
        return utterances
    places = np.random.default_rng(seed).choice(len(utterances), limit, replace=False)
    return [utterances[i] for i in sorted(places)]


def answer_limit(listener: Listener, utterances: list[Utterance]) -> int:
    """Tokens after which every transcript is cut, under all conditions: half again the longest."""
    lengths = [len(listener.processor.answer_ids(plain_text(u.text))) for u in utterances]
    return max(lengths) * 3 // 2
