"""The recipe that flags make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from secateur.cli.flags import MACHINE, OPTIONS, Flags, calibration, with_flags
from secateur.runs.errors import SecateurError

_OPTIONS: Flags = {
    "--pattern": "recipe.pattern",
    "--allocate": "recipe.allocation",
    "--only": "recipe.only",
    "--skip": "recipe.skip",
    **calibration("recipe"),
    "--format": "recipe.format",
    "--save-dtype": "recipe.save_dtype",
    **MACHINE,
}
# Short forms put a stage into the chain, change it there, or take it out.
_STAGES: Flags = {
    "--refit/--no-refit": "stages.refit",
    "--reconstruct/--no-reconstruct": "stages.reconstruct",
    "--permute/--no-permute": "stages.permute",
    "--quantize-group": "stages.quantize.group",
    "--symmetric/--asymmetric": "stages.quantize.symmetric",
    "--quantized-format": "stages.quantize.format",
    "--train-scales/--no-train-scales": "stages.scales",
}
_INTEGERS = {f"int{bits}": bits for bits in OPTIONS["stages.quantize.bits"]["choices"]}


@with_flags(edits=_STAGES, given=_OPTIONS)
def recipe_from_flags(
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe; other flags override its values")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="a stage, repeatable: together they are the whole chain, in this order",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="what chooses the mask, or auto; see `secateur ls methods` "
            "(default: wanda, then refit)"
        ),
    ] = None,
    rebuild: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="exchange badly chosen weights of the mask: barber or swaps (default: no)",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(_INTEGERS), help="make the kept weights integers (default: no)"
        ),
    ] = None,
    edits: dict[str, Any],
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="share of weights to remove, anywhere; short for --pattern (default: 0.5)"
        ),
    ] = None,
    given: dict[str, Any],
    plan: Annotated[
        Path | None,
        typer.Option(
            help="a plan file to follow instead of --allocate; its pattern is the default"
        ),
    ] = None,
) -> Any:
    """Return the recipe of the file, or the default one, with the given flags put over it.

    Raises:
        SecateurError: flags that exclude each other, or an invalid value.
    """
    from secateur.patterns.plan import Plan
    from secateur.pruning.recipe import Recipe
    from secateur.runs.options import put_over, read_mapping

    if plan is not None and "allocation" in given:
        raise SecateurError("Give either --plan or --allocate, not both.")
    if sparsity is not None and "pattern" in given:
        raise SecateurError("Give either --sparsity or --pattern, not both.")
    if quantize is not None:
        edits.setdefault("quantize", {})["bits"] = _INTEGERS.get(quantize, quantize)
    if stage and (method or rebuild or edits):
        raise SecateurError(
            "--stage names the whole chain; leave out short forms such as --method and --refit, or "
            "write them as --stage too."
        )
    if method == "auto" and (rebuild or {"refit", "reconstruct"} & edits.keys()):
        raise SecateurError(
            "--method auto chooses its own stages; leave out --rebuild, --refit and --reconstruct."
        )
    asked: dict[str, Any] = {
        key: given.pop(key) for key in ("pattern", "allocation") if key in given
    }
    if sparsity is not None:
        asked["pattern"] = str(sparsity)
    if plan is not None:
        asked = {"pattern": str(Plan.from_file(plan).pattern)} | asked
        asked["allocation"] = {"method": "plan", "file": str(plan)}
    written = read_mapping(recipe, Recipe.noun) if recipe else {}
    if stage or method:
        chain = [read_stage(each) for each in stage or [str(method)]]
        written["stages"] = "auto" if chain == [{"method": "auto"}] else chain
    # What auto stands for follows the pattern; other stages of a file may yet lose what it forbids.
    if stage or method or written.get("stages") == "auto":
        written |= asked
    values = Recipe.from_mapping(written).model_dump(mode="json") | asked
    values["stages"] = _edited(values["stages"], rebuild, edits)
    return Recipe.from_mapping(put_over(values, given))


def read_stage(text: str) -> dict[str, Any]:
    """Read ``NAME`` or ``NAME:KEY=VALUE,...``; values are YAML scalars.

    Raises:
        SecateurError: the form is another one, or a key is there twice.
    """
    name, _, rest = text.partition(":")
    stage: dict[str, Any] = {"method": name.strip()}
    for pair in rest.split(",") if rest else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        try:
            read = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            equals = ""
        if not (name and key and equals) or key in stage:
            raise SecateurError(
                f"The stage {text} is not understood at {pair!r}; write NAME or "
                "NAME:KEY=VALUE,KEY=VALUE, each key once."
            )
        stage[key] = read
    return stage


def _edited(
    stages: Sequence[Mapping[str, Any]], rebuild: str | None, edits: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The stages with those of short forms put in, changed or taken out."""
    from secateur.methods import STAGES

    chain = list(stages)
    if rebuild is not None:
        exchanging = [
            name
            for name, stage in STAGES.items()
            if not (stage.chooses_mask or stage.keeps_mask or stage.comes_first)
        ]
        if rebuild not in exchanging:
            raise SecateurError(
                f"{rebuild} exchanges no weights of a mask; --rebuild takes "
                f"{' or '.join(exchanging)}."
            )
        if all(stage["method"] != rebuild for stage in chain):
            choosing = [STAGES[stage["method"]].chooses_mask for stage in chain]
            behind = len(choosing) - choosing[::-1].index(True)
            chain.insert(behind, {"method": rebuild})
    for name, edit in edits.items():
        present = [stage for stage in chain if stage["method"] == name]
        options = edit if isinstance(edit, dict) else {}
        if edit is False:
            chain = [stage for stage in chain if stage["method"] != name]
        elif present:
            chain = [{**stage, **options} if stage in present else stage for stage in chain]
        elif name == "quantize" and "bits" not in options:
            raise SecateurError(
                "--quantize-group, --asymmetric and --quantized-format say how to quantise; give "
                "--quantize int4, int8 or int3 as well."
            )
        else:
            chain.append({"method": name, **options})
    # Sorting is stable: what has no place of its own stays where it was.
    return sorted(chain, key=_place)


def _place(stage: Mapping[str, Any]) -> int:
    from secateur.methods import STAGES

    kind = STAGES[stage["method"]]
    return -1 if kind.comes_first else kind.comes_last + (kind.follows is not None)
