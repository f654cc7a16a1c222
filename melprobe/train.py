"""`python -m melprobe.train RECIPE.yaml [--field value ...]`: train, or go on training.

The same command again continues a run that was stopped, however it was stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from pydantic import ValidationError

from melprobe.errors import UsageError, run
from melprobe.training.loop import fit
from melprobe.training.recipe import Recipe, SpeechRecipe, describe, read_recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe, apply the overrides, train."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        raise UsageError(
            "name a recipe: python -m melprobe.train recipes/mel-mini.yaml [--optim.lr 3e-4 ...]"
        )
    recipe = _override(read_recipe(Path(words[0])), words)
    _refuse_other_recipe(recipe)
    log = fit(_task(recipe), recipe)
    print(f"trained to step {log[-1]['step']}; best checkpoint: {recipe.out / 'best'}")


def _override(recipe: Recipe, words: list[str]) -> Recipe:
    try:
        return tyro.cli(
            type(recipe), default=recipe, args=words[1:], prog=f"melprobe.train {words[0]}"
        )
    except ValidationError as error:
        raise UsageError(describe(error)) from None


def _refuse_other_recipe(recipe: Recipe) -> None:
    """A folder belongs to one recipe: going on with another would make a log that lies."""
    path = recipe.out / "recipe.json"
    text = recipe.model_dump_json(indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        old = type(recipe).model_validate_json(path.read_text())
        fields = [
            name
            for name in type(recipe).model_fields
            if getattr(old, name) != getattr(recipe, name)
        ]
        raise UsageError(
            f"{recipe.out}: started with another recipe ({', '.join(fields)} differ); "
            f"take another --out, or delete it"
        )
    recipe.out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _task(recipe: Recipe):
    if isinstance(recipe, SpeechRecipe):
        from melprobe.training.speech import SpeechTask

        return SpeechTask(recipe)
    from melprobe.training.text import TextTask

    return TextTask(recipe)


if __name__ == "__main__":
    run(main)
