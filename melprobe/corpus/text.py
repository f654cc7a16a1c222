"""What the model is taught to write: lower-case words without punctuation, numerals as they are."""

import re
import unicodedata


def plain_text(text: str) -> str:
    """Lower case, apostrophes inside words kept, everything else that is no letter or digit gone.

    Corpora disagree about capitals and full stops, and no WER counts them; a training target
    that disagrees with itself costs loss that has nothing to do with hearing. Accents are composed
    (NFC): on their own they are no letters, and would be lost.
    """
    text = unicodedata.normalize("NFC", text.lower()).replace("’", "'")
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text))
