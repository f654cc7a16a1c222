"""`python -m melprobe.train RECIPE.yaml [--field value ...]`: train, or go on training.

`torchrun --nproc-per-node N -m melprobe.train RECIPE.yaml` trains in N processes, the same.
The same command again continues a run that was stopped, however it was stopped. Fields are those
of the recipe, dotted: `--optim.lr 3e-4 --data.train.0.repeat 2`; values are YAML.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from pydantic import ValidationError
from transformers.utils.logging import disable_progress_bar

from melprobe.errors import UsageError, run
from melprobe.folders import held
from melprobe.training.loop import fit
from melprobe.training.recipe import Recipe, SpeechRecipe
from melprobe.training.recipe_file import read_recipe, write_recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Read the recipe with its overrides, train."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    if not words or words[0].startswith("-"):
        raise UsageError(
            "name a recipe: python -m melprobe.train recipes/mini-base.yaml [--optim.lr 3e-4 ...]"
        )
    recipe = read_recipe(Path(words[0]), _overrides(words[1:]))
    _refuse_other_recipe(recipe)
    disable_progress_bar()  # theirs, of loading and saving: ours shows the steps
    task = _task(recipe)  # a recipe that can't begin leaves no folder behind
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    with held(recipe.out) if first else nullcontext():
        if first:
            write_recipe(recipe)
        log = fit(task, recipe)
    if not first:
        return
    best = recipe.out / "best"  # a run that learns no text has none
    found = f"best checkpoint: {best}" if best.exists() else f"checkpoint: {recipe.out / 'last'}"
    print(f"trained to step {log[-1]['step']}; {found}")


def _overrides(words: list[str]) -> dict[str, str]:
    """`--optim.lr 3e-4 --seed=1` to {"optim.lr": "3e-4", "seed": "1"}."""
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            raise UsageError(f"{word!r}: overrides look like --optim.lr 3e-4")
        name = flag.removeprefix("--").replace("-", "_")
        if not equals and (value := next(rest, "")) == "":
            raise UsageError(f"{word}: a value must follow")
        found[name] = value
    return found


def _refuse_other_recipe(recipe: Recipe) -> None:
    """A folder belongs to one recipe: going on with another would make a log that lies."""
    path = recipe.out / "recipe.json"
    if not path.exists():
        return
    try:
        old = type(recipe).model_validate_json(path.read_bytes())
    except ValidationError:
        raise UsageError(
            f"{recipe.out}: holds a run of another kind of recipe, or its recipe.json is damaged; "
            "take another --out"
        ) from None
    # A folder may be moved, or named from elsewhere; and how processes share the work changes none.
    names = type(recipe).model_fields.keys() - {"out", "parallel"}
    fields = sorted(name for name in names if getattr(old, name) != getattr(recipe, name))
    if fields:
        raise UsageError(
            f"{recipe.out}: started with another recipe ({', '.join(fields)} differ); "
            f"take another --out, or delete it"
        )


def _task(recipe: Recipe):
    if isinstance(recipe, SpeechRecipe):
        from melprobe.training.speech import SpeechTask

        return SpeechTask(recipe)
    from melprobe.training.text import TextTask

    return TextTask(recipe)


if __name__ == "__main__":
    run(main, resumable=True)
