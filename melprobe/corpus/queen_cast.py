"""Who plays whom in Flight of the Amazon Queen, and which of their lines are no words.

The cast is in the game's credits (`CREDIT2.CRD` in its data file). One artist plays up to ten
characters, so a test of unheard voices must hold out artists. For some characters the credits name
two artists, and voices off are not named at all.
"""

import re
from typing import NamedTuple

from melprobe.corpus.queen_bank import COMIC, PLAYER, Line
from melprobe.corpus.text import plain_text

CAST: dict[str, dict[str, tuple[str, ...]]] = {
    "Brad Lavelle": {PLAYER: (PLAYER,), "Commander Rocket's comic": (COMIC,)},
    "Tom Hill": {
        "Sparky": ("SPARKY", "Sparky"),
        "Jimmy Cook": ("JIM", "Jimmy"),
        "Skip": ("LOU", "Skip"),
        "Gorilla": ("APE", "gorilla", "vicious dinosaur"),
        "Wedgewood": ("WEDGE", "Wedgewood"),
        "Eddy": ("Eddy",),
    },
    "Bill Hootkins": {
        "Frank Ironstein": ("FRANK", "Frank"),
        "Bellboy": ("LARIS", "bellboy"),
        "Bud": ("BUD", "Bud"),
        "John": ("JOHN", "John"),
        "Chef": ("CHEF", "chef"),
    },
    "Enn Reitel": {
        "Anderson": ("AND", "Anderson"),
        "Henry": ("HENRY", "Henry"),
        "Charon": ("DEATH", "ferryman"),
    },
    "Tom Hill or Bill Hootkins": {"Prisoner": ("MAN", "bedraggled prisoner", "tired prisoner")},
    "Tom Hill or Enn Reitel": {"Rico": ("Rico",)},
    "Enn Reitel or Mike Hurley": {"Klunk": ("KLUNK", "Klunk")},
    "Mike Hurley": {"Big Hugh": ("Hugh",)},
    "Jon Coleman": {"Trader Bob": ("BOB", "Trader Bob")},
    "Debbie Arnold": {
        "Princess Azura": ("PRIN", "Princess Azura", "azura obj"),
        "Showering Amazon": ("SHOWERAM", "showering Amazon"),
    },
    "Debbie Arnold or Regina Reagan": {"Lola": ("LOLA", "Lola")},
    "Regina Reagan": {
        "Mary-Lou Cook": ("TAM", "Mary-Lou"),
        "Witch Doctor": ("WITCH", "witch doctor"),
    },
    "Lisa Valdez": {"Faye Russel": ("FAYE", "Faye"), "Rita": ("Rita",)},
    "Penelope Keith": {"Temple Guardian": ("ORACLE", "guardian")},
    "Barry James": {"Ian": ("IAN", "Ian"), "Pygmy Chief": ("CHIEF", "chief")},
    "Jessica Martin": {
        "Naomi": ("NAOMI", "Naomi"),
        "Secretary": ("SEC", "secretary"),
        "Zombie Woman": ("ZOMBIE", "zombie woman"),
    },
}
HELD_OUT = ("Penelope Keith", "Barry James", "Jessica Martin")

# Grunts, barking, a mouth full of food, and an invented language.
_WORDLESS = {"APE.DOG", "DOG.DOG", "SPARKY8.DOG", "TALLPYG.DOG", "CHIEF4.DOG", "WITCH4.DOG"}
_NOISES = re.compile(
    r"un?gh(a|ana)?|pootani?|choonaga|(ka)?chunga|oo+f|y?ow|oo+[pt]|garoop|eep|u?ar+gh|urgh|bah"
    r"|er+|u+m+|hm+|[th]ee|ha|har|woo+f|ruff|aroof|rowr|whoop|grr+|squ?w?a[wr]k|wa+rr?k|aark"
    r"|smash|bleep|budda|glub|gulp"
)
_CONSONANTS_ONLY = re.compile(r"[^aeiouy\d']{3,}")
_DRAWN_OUT = re.compile(r"(.)\1\1")
_STAGE_NOTE = re.compile(r"\([^)]*\)|<[^>]*>")


class Role(NamedTuple):
    """A character and the artist, or artists, who may be heard."""

    artist: str
    character: str

    def __str__(self) -> str:
        return f"{self.artist} as {self.character}"


ROLES = {
    name: Role(artist, character)
    for artist, characters in CAST.items()
    for character, names in characters.items()
    for name in names
}


def words_of(line: Line) -> str:
    """The text without codes and stage notes; empty where no words are spoken."""
    if line.scene in _WORDLESS and line.speaker != PLAYER:
        return ""
    text = _STAGE_NOTE.sub(" ", line.text.replace("^_", ""))
    text = " ".join(text.split()).removeprefix("...")
    words = plain_text(text).split()
    noises = sum(
        bool(_NOISES.fullmatch(word) or _CONSONANTS_ONLY.fullmatch(word) or _DRAWN_OUT.search(word))
        for word in words
    )
    return "" if 2 * noises >= len(words) or "#" in text else text.strip()
