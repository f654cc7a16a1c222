"""Recipe files: read, changed from the command line (`--optim.lr 3e-4`), left with a run."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from melprobe.errors import UsageError
from melprobe.training.recipe import Recipe, RecipePart, SpeechRecipe, TextRecipe


def read_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Parse and check a recipe file; UsageError names the field.

    overrides: dotted fields to YAML values, such as {"optim.lr": "3e-4"}.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{path}: not a readable YAML recipe ({error})"
        raise UsageError(" ".join(message.split())) from None
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: a recipe is a mapping of fields")
    for name, value in (overrides or {}).items():
        try:
            # YAML reads 3e-4 as text; pydantic makes a number of it where one is due.
            set_field(fields, name, yaml.safe_load(value))
        except yaml.YAMLError:
            raise UsageError(f"--{name} {value}: not a value in YAML") from None
    kind = TextRecipe if fields.get("task") == "text" else SpeechRecipe
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"{path}: {describe(error)}") from None


def write_recipe(recipe: Recipe) -> None:
    """Leave `recipe.json` in the run's folder."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    draft = recipe.out / "recipe.draft"
    draft.write_text(recipe.model_dump_json(indent=2) + "\n")
    draft.replace(recipe.out / "recipe.json")


def set_field(fields: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted field in place; UsageError where there is no such place."""
    *path, last = [int(part) if part.isdecimal() else part for part in name.split(".")]
    place: Any = fields
    try:
        for part in path:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
        place[last] = value
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UsageError(f"--{name} {value}: the recipe has no such field to set") from None


def describe(error: ValidationError, known: Sequence[str] | None = None) -> str:
    """A validation error in one line: every field, and what is wrong with it.

    known: the fields that there are; those of recipes when not given.
    """
    known = _field_names() if known is None else known
    parts = []
    for e in error.errors():
        message = e["msg"]
        if e["type"] == "extra_forbidden":
            near = get_close_matches(str(e["loc"][-1]), known, n=1)
            message = "there is no such field" + (f"; did you mean {near[0]}?" if near else "")
        parts.append(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {message}")
    return "; ".join(parts).replace("Value error, ", "")


def _field_names() -> list[str]:
    """Of all parts of recipes."""
    models: list[type[RecipePart]] = [RecipePart]
    for model in models:
        models += model.__subclasses__()
    return sorted({name for model in models for name in model.model_fields})
