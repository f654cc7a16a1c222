"""The sizes that a study is made at: one recipe each, which its arms change."""

import copy
import math
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from melprobe.analysis.protocol import choose
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.errors import UsageError
from melprobe.training.recipe import SpeechRecipe
from melprobe.training.recipe_file import describe, set_field

FOLDER = Path(__file__).parents[2] / "recipes" / "studies"


class Test(BaseModel):
    """What is transcribed to score an arm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: str
    clips: Annotated[int, Field(ge=0)] = 0
    """Drawn from it; 0 for all."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Longer ones are left out, where training has none."""

    def drawn(self) -> list[Utterance]:
        """The clips, the same every time."""
        known = read_manifest(find_manifest(self.manifest))
        fitting = [u for u in known if u.duration <= (self.max_seconds or math.inf)]
        if not fitting:
            raise UsageError(f"test: no clip of {self.manifest} lasts at most {self.max_seconds} s")
        return choose(fitting, self.clips, seed=0)


def _is_rising(length: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= length[0] < length[1] < math.inf:
        raise ValueError("name the shorter one first, such as [0, 1.5]")
    return length


Length = Annotated[tuple[float, float], AfterValidator(_is_rising)]


def within(seconds: Any, length: tuple[float, float]) -> Any:
    """Whether a clip of `seconds`, or each of an array of them, is longer than the first number
    and no longer than the second: so is `Test.max_seconds` meant."""
    return (length[0] < seconds) & (seconds <= length[1])


class Size(BaseModel):
    """`recipes/studies/SIZE.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any]
    """Of `melprobe.train`, without `out` and `seed`."""
    n_layers: Annotated[int, Field(ge=2)]
    """Of its base."""
    seeds: Annotated[int, Field(ge=1)]
    test: Test
    bare: dict[str, Any] = {}
    """What makes of its recipe that of the encoder-free arm, by dotted field, if it isn't yet."""
    timed: dict[str, Any]
    """What gives its recipe, of the next-token loss alone, framewise targets at known times, in
    `data.stages` of as many steps."""
    pretrained_lora: str = ""
    """An adapter that has heard; when not given, what the study's own twin was trained to."""
    twin: dict[str, Any]
    """What makes of its recipe that of the encoder-initialised twin, by dotted field."""
    random_encoder: dict[str, Any]
    """And what makes of the twin's encoder a random one that learns."""
    limited: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much of its recipe's data the study of data's scale calls 1."""
    more: list[dict[str, Any]]
    """`data.train` with ten times as much, the rest synthetic."""
    long: dict[str, Any]
    """What the masking study changes so that clips take many positions, by dotted field."""
    lengths: tuple[Length, ...]
    """Seconds, of clips that it scores apart."""
    hardware: str
    """What it is meant for, in words."""
    devices: Annotated[int, Field(ge=1)] = 1
    tflops: Annotated[float, Field(gt=0)]
    """What one device multiplies in bfloat16 at best, 10^12 flop a second."""
    memory_gb: Annotated[float, Field(gt=0)]
    """Of one device."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.3
    """How much of that training is taken to reach."""

    def shared(self, share: float) -> list[dict[str, Any]]:
        """`data.train` with so much of what is called 1, of every corpus."""
        train, share = self.recipe["data"]["train"], share * self.limited
        return [{**corpus, "share": float(corpus.get("share", 1.0)) * share} for corpus in train]

    def with_changes(self, changes: dict[str, Any], out: Path, seed: int) -> SpeechRecipe:
        """Its recipe, changed; UsageError where that is none."""
        fields = copy.deepcopy(self.recipe)
        for name, value in {**changes, "out": str(out), "seed": seed}.items():
            set_field(fields, name, value)
        try:
            return SpeechRecipe.model_validate(fields)
        except ValidationError as error:
            raise UsageError(f"{out.name}: {describe(error)}") from None


def read_size(name: str) -> Size:
    """By the name of its file in recipes/studies, or a path; UsageError for what is wrong in it."""
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else FOLDER / f"{name}.yaml"
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
    try:
        size = Size.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise UsageError(f"--size {name}: there are {known}, or a file of your own") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a readable size ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        raise UsageError(f"{path}: {describe(error)}") from None
    size.with_changes({}, Path(f"{path}: recipe"), 0)  # arms are made of its parts
    return size
