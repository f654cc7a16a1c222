"""What a synthesiser is given to say: random word sequences, example sentences, files, manifests.

Only sentences whose written form is what an engine speaks are let through: no numerals,
abbreviations or acronyms. Splits are kept apart by n-grams of words, see `draw`.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

from melprobe.corpus.engines import word_labels
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import UsageError

WORDS = Path(__file__).parent / "words.txt"
WORDNET = Path("/usr/share/wordnet")
MOST_WORDS = 14
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
_ABBREVIATIONS = {
    *("mr", "mrs", "ms", "dr", "st", "jr", "sr", "prof", "gen", "col", "capt"),
    *("etc", "vs", "eg", "ie", "vol", "ft", "oz", "lb"),
}


def clean(line: str) -> str | None:
    """A line as it will be spoken and written in the manifest; None if that can't be known.

    Hyphens become blanks, so that a word is one word to every scorer.

    >>> clean('Well... "I am half-asleep", he said')
    'Well, I am half asleep, he said'
    >>> clean("Room 12"), clean("the FBI"), clean("Dr. No")
    (None, None, None)
    """
    line = line.replace("’", "'").replace("‘", "'").replace('"', "")
    line = re.sub(r"\s*(?:\.{2,}|…|\s-+\s|--+)\s*", ", ", line).replace("-", " ")
    line = re.sub(r"\s*([.,;:!?])[\s.,;:!?]*", r"\1 ", line).strip(" ,;:")
    for token in line.split():
        word = token.rstrip(".,;:!?")
        if not _WORD.fullmatch(word) or word[1:] != word[1:].lower():
            return None
        if word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.lower() not in {"a", "i"}):
            return None
    return " ".join(line.split()) or None


def read_sentences(text: str) -> list[str]:
    """Clean, distinct sentences of a text source that is not random, in its own order.

    `text` is a file with one sentence a line, `wordnet`, or `manifest:NAME`. Raises UsageError if
    it is not there or nothing in it can be spoken.
    """
    if text == "wordnet":
        lines = wordnet_examples()
    elif text.startswith("manifest:"):
        path = find_manifest(text.removeprefix("manifest:"))
        if path.stem.startswith(("dev", "test")):
            raise UsageError(f"{path}: speak a training split, not {path.stem}")
        lines = [utterance.text for utterance in read_manifest(path)]
    elif Path(text).is_file():
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    else:
        raise UsageError(
            f"{text}: not a text file, `words`, `wordnet`, `manifest:NAME` or `shuffled:NAME`"
        )
    sentences: dict[tuple[str, ...], str] = {}
    for line in lines:
        sentence = clean(line)
        if sentence and len(sentence.split()) <= MOST_WORDS:
            sentences.setdefault(tuple(word_labels(sentence)), sentence)
    if not sentences:
        raise UsageError(f"{text}: no sentence of plain words in it")
    return list(sentences.values())


def wordnet_examples() -> list[str]:
    """The usage examples of Debian's wordnet-base: what stands in quotes in the glosses."""
    if not WORDNET.is_dir():
        raise UsageError("WordNet is not installed: run `apt install wordnet-base`")
    glosses = [
        line.partition(" | ")[2]
        for part in ("adj", "adv", "noun", "verb")
        for line in (WORDNET / f"data.{part}").read_text(encoding="utf-8").splitlines()
    ]
    examples = [quote for gloss in glosses for quote in re.findall(r'"([^"]+)"', gloss)]
    return [example for example in examples if len(example.split()) >= 3]


def word_sequences(rng: random.Random, shortest: int, longest: int) -> Iterator[str]:
    """Endless random sequences of different words of the closed vocabulary, each one once."""
    words = WORDS.read_text(encoding="utf-8").split()
    seen = set()
    while True:
        sequence = " ".join(rng.sample(words, rng.randint(shortest, longest)))
        if sequence not in seen:
            seen.add(sequence)
            yield sequence


def shuffled_words(rng: random.Random, sentences: Sequence[str]) -> Iterator[str]:
    """Endless sequences of the sentences' words, as frequent and as many, but in no order.

    What they say can't be guessed, and the words are those of the sentences' domain.
    """
    spoken = [word_labels(sentence) for sentence in sentences]
    words = [word for labels in spoken for word in labels]
    seen: set[str] = set()
    while True:
        known = len(seen)
        rng.shuffle(words)
        rest = iter(words)
        for labels in spoken:
            sequence = " ".join(islice(rest, len(labels)))
            if sequence not in seen:
                seen.add(sequence)
                yield sequence
        if len(seen) == known:
            return


def draw(text: str, sizes: Mapping[str, int], seed: int) -> dict[str, list[str]]:
    """Sentences for each split; `train` may say a sentence several times, the others never.

    No sentence of another split shares an n-gram of words (a whole sentence where it is shorter)
    with `train`; n is 4, or 3 for `words`, whose other splits have at least 3 words.
    """
    rng = random.Random(f"sentences {seed}")
    n = 3 if text == "words" else 4
    if text == "words":
        held_out, training = word_sequences(rng, n, 6), word_sequences(rng, 2, 6)
    elif text.startswith("shuffled:"):
        sentences = read_sentences(text.replace("shuffled", "manifest", 1))
        held_out = training = shuffled_words(rng, sentences)
    else:
        pool = read_sentences(text)
        rng.shuffle(pool)
        held_out = training = iter(pool)
    taken = {
        split: list(islice(held_out, size)) for split, size in sizes.items() if split != "train"
    }
    unseen = {gram for sentences in taken.values() for s in sentences for gram in ngrams(s, n)}
    apart = (sentence for sentence in training if unseen.isdisjoint(ngrams(sentence, n)))
    train = list(islice(apart, sizes["train"]))
    if not train or any(len(taken[split]) < sizes[split] for split in taken):
        raise UsageError(f"{text}: too few sentences for {dict(sizes)}; ask for fewer")
    return taken | {"train": list(islice(cycle(train), sizes["train"]))}


def ngrams(sentence: str, n: int) -> set[tuple[str, ...]]:
    """The n-grams of a sentence's words, or all its words if they are fewer than n.

    >>> sorted(ngrams("Go back, now", 2))
    [('back', 'now'), ('go', 'back')]
    """
    words = tuple(word_labels(sentence))
    return {words[start : start + n] for start in range(max(1, len(words) - n + 1))}
