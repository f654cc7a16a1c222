"""One phone set for every corpus: ARPAbet's 39 without stress, as in the CMU dictionary.

flite, festival, pocketsphinx and MFA's `english_us_arpa` write ARPAbet, espeak-ng writes IPA in a
dozen accents, MFA's other English models another IPA. Folding loses what tells accents apart (a tap
is a t, a Scottish e is an ey): phones are targets and probes here, not phonetics.
"""

import re

from melprobe.errors import UsageError

SILENCE = "sil"
_VOWELS = ("aa", "ae", "ah", "ao", "aw", "ay", "eh", "er", "ey", "ih", "iy", "ow", "oy", "uh", "uw")
_STOPS = ("p", "b", "t", "d", "k", "g", "ch", "jh")
_FRICATIVES = ("f", "v", "th", "dh", "s", "z", "sh", "zh", "hh")
_SONORANTS = ("m", "n", "ng", "l", "r", "w", "y")
PHONES = (*_VOWELS, *_STOPS, *_FRICATIVES, *_SONORANTS)
CLASSES = (SILENCE, *PHONES)
"""Frame labels: what a moment of speech can be."""

# espeak-ng's IPA: one symbol, or several that sound one after another.
_IPA = {
    **{letter: letter for letter in "bdfklmnpstvwz"},
    **{"ɡ": "g", "h": "hh", "j": "y", "ŋ": "ng", "ɹ": "r", "ɾ": "t", "ʔ": "t", "n̩": "n"},
    **{"t̪": "th", "θ": "th", "ð": "dh", "ʃ": "sh", "ʒ": "zh", "tʃ": "ch", "dʒ": "jh"},
    **{"a": "ae", "æ": "ae", "aa": "ae", "ɑː": "aa", "ɒ": "aa", "ɑə": "aa", "ɔ": "ao", "ɔː": "ao"},
    **{"ɔə": "ao", "oə": "ao", "ʌ": "ah", "ə": "ah", "ɐ": "ah", "ɛ": "eh", "eə": "eh", "ɛə": "eh"},
    **{"ɜː": "er", "ɚ": "er", "ɪ": "ih", "ᵻ": "ih", "i": "iy", "iː": "iy", "ʊ": "uh", "uː": "uw"},
    **{"eɪ": "ey", "ei": "ey", "eː": "ey", "aɪ": "ay", "əɪ": "ay", "ɔɪ": "oy", "oɪ": "oy"},
    **{"aʊ": "aw", "æʊ": "aw", "oʊ": "ow", "əʊ": "ow", "ʌʊ": "ow", "əu": "ow", "oː": "ow"},
    **{"əl": "ah l", "iə": "iy ah", "ʊə": "uh ah", "aɪə": "ay ah", "aɪɚ": "ay er"},
    **{"aː": "aa", "a:": "aa", "e": "eh", "o": "ow", "ɜ": "er", "əɹ": "er", "ʌɹ": "er"},
    **{"ʉ": "uw", "ʉː": "uw", "ʉɹ": "uh r", "ʌʉ": "ow", "ʍ": "w", "ʲ": "y", "x": "k", "ɑ̃": "aa n"},
    **{"ɑːɹ": "aa r", "ɔːɹ": "ao r", "oːɹ": "ao r", "ɛɹ": "eh r", "ʊɹ": "uh r", "ɪɹ": "ih r"},
}
# What the Montreal Forced Aligner's English dictionaries have beside or in place of those.
_MFA = {
    **{"aj": "ay", "ej": "ey", "əw": "ow", "ɔj": "oy", "ɝ": "er", "ɑ": "aa", "ɒː": "aa"},
    **{"ɛː": "eh", "c": "k", "ɟ": "g", "ç": "hh", "ʎ": "l"},
    **{"ɫ": "l", "ɫ̩": "ah l", "m̩": "ah m", "ɱ": "m", "ɲ": "n", "ɾ̃": "n", "d̪": "dh"},
}
_SECONDARY = re.compile("[ʰʲʷ]")
"""MFA's aspirated, palatalised and rounded consonants."""
_FOLDED = {
    **{phone: (phone,) for phone in PHONES},
    **{"ax": ("ah",), "axr": ("er",), "ix": ("ih",), "el": ("ah", "l"), "en": ("ah", "n")},
    **{symbol: tuple(phones.split()) for symbol, phones in (_MFA | _IPA).items()},
}


def fold(label: str) -> tuple[str, ...]:
    """The phones of `PHONES` that a corpus' label stands for, in their order.

    Raises UsageError for a label that no engine here writes.
    """
    forms = (label, label.rstrip("012").lower(), _SECONDARY.sub("", label))
    known = next((_FOLDED[form] for form in forms if form in _FOLDED), None)
    if known is None:
        raise UsageError(
            f"phone {label!r}: neither ARPAbet nor a symbol of espeak-ng's or MFA's English"
        )
    return known
