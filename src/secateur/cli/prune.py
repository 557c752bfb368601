"""``secateur prune``, and ``plan`` and ``estimate``, which look ahead."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.flags import AsJson, Model, Output, Restart, TrustRemoteCode, with_flags
from secateur.cli.recipe import recipe_from_flags
from secateur.runs.errors import SecateurError


@with_flags(recipe=recipe_from_flags)
def prune(
    model: Model,
    output: Output,
    recipe: Any,
    save_recipe: Annotated[
        Path | None, typer.Option(help="write the recipe that these flags make, then go on")
    ] = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model block by block and save a checkpoint that loads everywhere."""
    from secateur.cli.console import print_json, progress_bars, show_result
    from secateur.pruning.prune import prune as run
    from secateur.report.terminal import report_table
    from secateur.runs.files import write_text

    if save_recipe is not None:
        save_recipe = save_recipe.expanduser()
        _check_target(save_recipe, "recipe", model, _read_recipe)
        write_text(save_recipe, recipe.to_yaml())
    with progress_bars() as progress:
        result = run(
            model,
            recipe,
            output,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    show_result(report_table(result.report), result.report.notes, output)


@with_flags(recipe=recipe_from_flags)
def plan(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="the plan.json to write, or to write anew")
    ],
    recipe: Any,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Divide the zeros among the linears of a model, without pruning it."""
    from secateur.cli.console import progress_bars, say, stdout
    from secateur.patterns.plan import Plan
    from secateur.pruning.prune import plan as run
    from secateur.report.terminal import plan_table

    output = output.expanduser()
    _check_target(output, "plan", model, Plan.from_file)
    with progress_bars() as progress:
        result = run(model, recipe, trust_remote_code=trust_remote_code, progress=progress)
    result.write(output)
    if as_json:
        print(result.to_json(), end="")
        return
    stdout.print(plan_table(result))
    say("Written to ", output, f"; secateur prune --plan {output} follows it.")


@with_flags(recipe=recipe_from_flags)
def estimate(
    model: Model, recipe: Any, trust_remote_code: TrustRemoteCode = False, as_json: AsJson = False
) -> None:
    """Tell peak memory and work of a run before it starts."""
    from secateur.cli.console import print_json, stdout
    from secateur.estimation.estimate import estimate as run
    from secateur.report.terminal import estimate_table

    result = run(model, recipe, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        stdout.print(estimate_table(result))


def _check_target(path: Path, noun: str, model: str, read: Callable[[Path], object]) -> None:
    """Raise SecateurError unless a new file can be written there, or an older one of its kind."""
    from secateur.runs.files import writing

    with writing(path):
        if path.resolve().is_relative_to(Path(model).expanduser().resolve()):
            raise SecateurError(f"{path} lies in the model's folder; name a file elsewhere.")
        if path.is_symlink():
            raise SecateurError(f"{path} is a link; name the file itself to write the {noun} to.")
        if path.exists():
            if not path.is_file():
                raise SecateurError(f"{path} is no file; name one to write the {noun} to.")
            try:
                read(path)
            except SecateurError as error:
                raise SecateurError(
                    f"{path} is there already and is no {noun}; name another file."
                ) from error
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise SecateurError(f"No {noun} can be written to {path}, {folder} is closed to you.")


def _read_recipe(path: Path) -> None:
    """Raise SecateurError unless a file is a recipe that ``--save-recipe`` may have written."""
    from secateur.pruning.recipe import Recipe
    from secateur.runs.options import read_mapping

    # Any recipe is valid, {} too, but what is written here names every option.
    values = read_mapping(path, Recipe.noun)
    Recipe.from_mapping(values)
    if values.keys() != Recipe.model_fields.keys():
        raise SecateurError(f"{path} was not written by --save-recipe; name another file.")
