"""``secateur shrink``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import (
    Bos,
    Calibration,
    Device,
    ForwardDtype,
    Length,
    Model,
    ReportAsJson,
    Restart,
    Seed,
    TrustRemoteCode,
    given,
    text_options,
)
from secateur.runs.errors import SecateurError


class Preset(StrEnum):
    """Ways to choose what goes."""

    DEFAULT = "default"
    PAPER = "paper"


class Budget(StrEnum):
    """What a share is of."""

    PARAMETERS = "parameters"
    LATENCY = "latency"


def shrink(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for the smaller checkpoint.")
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the blocks' parameters to remove. (default: 0.5)")
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="How units are chosen; paper is Bonsai as published. (default: default)"),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="Same widths in all blocks: needs no extra code."),
    ] = False,
    padded: Annotated[
        bool, typer.Option("--padded", help="Zeros for what is gone: loads everywhere, no faster.")
    ] = False,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Write what every size would cost, and cut nothing."),
    ] = False,
    ffn_only: Annotated[bool, typer.Option("--ffn-only", help="Leave attention as it is.")] = False,
    whole_groups: Annotated[
        bool,
        typer.Option("--whole-groups", help="Key-value groups go with all their query heads."),
    ] = False,
    grid: Annotated[
        int | None,
        typer.Option(help="Feed-forwards keep multiples of so many channels. (default: up to 64)"),
    ] = None,
    budget: Annotated[
        Budget | None,
        typer.Option(
            help="What --sparsity is a share of: parameters, or time here. (default: parameters)"
        ),
    ] = None,
    sub_models: Annotated[
        int | None, typer.Option(help="Sub-models of random widths to try. (default: 96)")
    ] = None,
    step: Annotated[
        float | None, typer.Option(help="paper: largest share one round removes. (default: 0.05)")
    ] = None,
    masks: Annotated[
        int | None, typer.Option(help="paper: sub-models that a round tries. (default: 200)")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="paper: wanda, magnitude, fluctuation or random. (default: wanda)"),
    ] = None,
    calibration: Calibration = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration windows; of each round. (default: 128; paper: 32)"),
    ] = None,
    length: Length = None,
    seed: Seed = None,
    bos: Bos = None,
    device: Device = None,
    dtype: ForwardDtype = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: ReportAsJson = False,
) -> None:
    """Remove channels and heads, and save a smaller model."""
    from secateur.cli.console import print_json, progress_bars, show_result, stdout
    from secateur.report.terminal import curve_table, shrink_table
    from secateur.shrinking.curve import size_curve
    from secateur.shrinking.options import ShrinkOptions
    from secateur.shrinking.shrink import shrink as run

    if uniform and padded:
        raise SecateurError("Give either --uniform or --padded, not both.")
    text = text_options(calibration, samples, length, seed, bos)
    options = ShrinkOptions.from_mapping(
        given(
            {
                "sparsity": sparsity,
                "preset": None if preset is None else preset.value,
                "form": "uniform" if uniform else "padded" if padded else None,
                "ffn_only": ffn_only,
                "whole_groups": whole_groups or None,
                "grid": grid,
                "budget": None if budget is None else budget.value,
                "sub_models": sub_models,
                "step": step,
                "masks": masks,
                "prior": prior,
                "calibration": text,
                "device": device,
                "dtype": None if dtype is None else dtype.value,
            }
        )
    )
    others: dict[str, Any] = {"restart": restart, "trust_remote_code": trust_remote_code}
    if curve:
        if sparsity is not None:
            raise SecateurError("Give either --sparsity or --curve, not both.")
        with progress_bars() as progress:
            found = size_curve(model, output, options, progress=progress, **others)
        if as_json:
            print_json(found.model_dump(mode="json"))
        else:
            stdout.print(curve_table(found))
            stdout.print(f"Widths of every size: {output / 'curve.json'}; a plot: curve.svg.")
            stdout.print(f"To look at: {output / 'secateur' / 'report.html'}", soft_wrap=True)
        return
    with progress_bars() as progress:
        result = run(model, output, options, progress=progress, **others)
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    show_result(shrink_table(result.report), result.report.notes, output)
