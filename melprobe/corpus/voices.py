"""What a synthetic speaker's name says: whose voice it is, and of which sex.

The manifests' `speaker` is `engine:voice`, for espeak-ng `espeak:accent+variant`. A variant sounds
alike in all accents, so it is the variant that must not be in two splits.
"""

FEMALE, MALE = "female", "male"

# As the voices' own files and pages say; espeak-ng's are the `gender` lines of the variants in
# Debian 12. The sex of a variant without one stays unknown.
_WOMEN = (
    *("flite:slt", "festival:slt-hts"),
    *("Alicia", "Andrea", "Annie", "anika", "anikaRobot", "aunty", "belinda", "f1", "f2", "f3"),
    *("f4", "f5", "grandma", "linda", "steph", "steph2", "steph3", "whisperf"),
)
_MEN = (
    *("flite:awb", "flite:kal16", "flite:rms", "festival:kal", "festival:ked"),
    *("Andy", "AnxiousAndy", "Demonic", "Denis", "Diogo", "Henrique", "Hugo", "Lee", "Marco"),
    *("Storm", "UniRobot", "antonio", "croak", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8"),
    *("michel", "miguel", "sandro", "travis", "victor", "whisper"),
)
_SAME = {"festival:slt-hts": "flite:slt"}
"""Made of the same person's recordings."""
_SEX = {**dict.fromkeys(_WOMEN, FEMALE), **dict.fromkeys(_MEN, MALE)}


def voice_of(speaker: str) -> str:
    """The voice of a manifest's speaker: one for all accents of an espeak-ng variant."""
    engine, _, voice = speaker.partition(":")
    _, plus, variant = voice.partition("+")
    if engine == "espeak" and plus:
        return f"{engine}:{variant}"
    return _SAME.get(speaker, speaker)


def sex_of(speaker: str) -> str:
    """`female` or `male` where a synthetic voice states it, else ""."""
    voice = voice_of(speaker)
    return _SEX.get(voice) or _SEX.get(voice.removeprefix("espeak:"), "")
