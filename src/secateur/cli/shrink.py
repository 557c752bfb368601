"""``secateur shrink``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli.flags import (
    MACHINE,
    AsJson,
    EstimateOnly,
    Flags,
    Model,
    MoreOptions,
    Output,
    Restart,
    TrustRemoteCode,
    calibration,
    with_flags,
)
from secateur.runs.errors import SecateurError

_SHRINK: Flags = {
    "--sparsity": "shrink.sparsity",
    "--preset": "shrink.preset",
    "--ffn-only": "shrink.ffn_only",
    "--only": "shrink.only",
    "--skip": "shrink.skip",
    "--whole-groups": "shrink.whole_groups",
    "--grid": "shrink.grid",
    "--budget": "shrink.budget",
    "--sub-models": "shrink.sub_models",
    "--step": "shrink.step",
    "--masks": "shrink.masks",
    "--prior": "shrink.prior",
    **calibration("shrink"),
    "--save-dtype": "shrink.save_dtype",
    **MACHINE,
}


@with_flags(given=_SHRINK)
def shrink(
    model: Model,
    output: Output,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="the same widths in every block, so that stock classes load the result",
        ),
    ] = False,
    padded: Annotated[
        bool,
        typer.Option(
            "--padded", help="zeros for what is gone: loads as the dense model does, no faster"
        ),
    ] = False,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="cut nothing, but write what every size would cost: curve.json and curve.svg",
        ),
    ] = False,
    options: MoreOptions = None,
    *,
    given: dict[str, Any],
    estimate: EstimateOnly = False,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Remove channels and heads, and save a smaller model."""
    from secateur.cli.console import (
        page_of,
        print_json,
        progress_bars,
        say,
        show_needs,
        show_result,
        show_table,
    )
    from secateur.report.terminal import curve_table, shrink_table
    from secateur.runs.options import put_over, read_mapping
    from secateur.shrinking.curve import size_curve
    from secateur.shrinking.options import ShrinkOptions
    from secateur.shrinking.shrink import shrink as run

    if uniform and padded:
        raise SecateurError("Give either --uniform or --padded, not both.")
    if curve and "sparsity" in given:
        raise SecateurError("Give either --sparsity or --curve, not both.")
    form = {"form": "uniform"} if uniform else {"form": "padded"} if padded else {}
    values = put_over(read_mapping(options, ShrinkOptions.noun) if options else {}, given | form)
    chosen = ShrinkOptions.from_mapping(values)
    if estimate:
        from secateur.estimation.shrinking import estimate_shrinking

        needs = estimate_shrinking(model, chosen, trust_remote_code=trust_remote_code)
        show_needs(needs, as_json)
        return
    others: dict[str, Any] = {"restart": restart, "trust_remote_code": trust_remote_code}
    if curve:
        with progress_bars() as progress:
            found = size_curve(model, output, chosen, progress=progress, **others)
        if as_json:
            print_json(found.model_dump(mode="json"))
            return
        show_table(curve_table(found), found.notes)
        say("Widths of every size: ", output / "curve.json", "; a plot: curve.svg.")
        say("To look at: ", page_of(output))
        return
    with progress_bars() as progress:
        result = run(model, output, chosen, progress=progress, **others)
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    show_result(shrink_table(result.report), result.report.notes, output)
