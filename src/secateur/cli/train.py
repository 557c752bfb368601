"""``secateur train`` and ``secateur recover``."""

from __future__ import annotations

import os
from contextlib import nullcontext
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
    with_flags,
)

_TRAIN: Flags = {
    "--tokens": "training.tokens",
    "--pattern": "training.pattern",
    "--only": "training.only",
    "--skip": "training.skip",
    "--learning-rate": "training.optimiser.learning_rate",
    "--batch-tokens": "training.batch_tokens",
    "--length": "training.length",
    "--bos": "training.bos",
    "--top-k": "training.distillation.top_k",
    "--low-rank": "training.low_rank.group",
    "--log-to": "training.log_to",
    "--seed": "training.seed",
    "--save-dtype": "training.save_dtype",
    **MACHINE,
}
_RECOVER: Flags = {
    "--network": "recovery.network",
    "--blocks/--no-blocks": "recovery.blocks",
    "--tokens": "recovery.tokens",
    "--rank": "recovery.rank",
    "--learning-rate": "recovery.learning_rate",
    "--batch-tokens": "recovery.batch_tokens",
    "--length": "recovery.length",
    "--bos": "recovery.bos",
    "--top-k": "recovery.distillation.top_k",
    "--log-to": "recovery.log_to",
    "--seed": "recovery.seed",
    "--save-dtype": "recovery.save_dtype",
    **MACHINE,
}
_Data = Annotated[
    list[str],
    typer.Option(
        help="text file, folder of them, or hub data set; several are shuffled together, "
        "NAME:WEIGHT for each makes a mix"
    ),
]


@with_flags(given=_TRAIN)
def train(
    model: Model,
    output: Output,
    data: _Data,
    given: dict[str, Any],
    preset: Annotated[
        str,
        typer.Option(
            help="default prunes first, for small budgets; ast is the paper's recipe; "
            "with keep-mask the mask of a pruned checkpoint stays"
        ),
    ] = "default",
    validation: Annotated[
        str | None,
        typer.Option(
            help="text file or hub data set to measure progress on "
            "(default: windows of the data, held out)"
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="the dense model to learn from (default: MODEL, if dense)")
    ] = None,
    options: MoreOptions = None,
    estimate: EstimateOnly = False,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train a model to a pattern, with masks that adapt and the dense model as teacher."""
    from secateur.cli.console import print_json, progress_bars, show_needs, show_result
    from secateur.report.terminal import training_table
    from secateur.runs.options import put_over, read_mapping
    from secateur.runs.progress import silent
    from secateur.training.options import Training
    from secateur.training.train import train as run

    values = put_over(read_mapping(options, Training.noun) if options else {}, given)
    chosen = Training.from_mapping(values, preset)
    if estimate:
        from secateur.estimation.training import estimate_training

        needs = estimate_training(
            model, chosen, teacher=teacher, trust_remote_code=trust_remote_code
        )
        show_needs(needs, as_json)
        return
    # Of the processes that torchrun started, one speaks.
    speaks = os.environ.get("RANK", "0") == "0"
    with progress_bars() if speaks else nullcontext(silent) as progress:
        result = run(
            model,
            chosen,
            output,
            data=data,
            validation=validation,
            teacher=teacher,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not speaks:
        return
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    show_result(training_table(result.report), result.report.notes, output)


@with_flags(given=_RECOVER)
def recover(
    model: Model,
    teacher: Annotated[str, typer.Option(help="the dense model that MODEL was cut from")],
    output: Output,
    data: _Data,
    given: dict[str, Any],
    options: MoreOptions = None,
    estimate: EstimateOnly = False,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Teach a cut model what the dense one knew."""
    from secateur.cli.console import print_json, progress_bars, show_needs, show_result
    from secateur.report.terminal import recovery_table
    from secateur.runs.options import put_over, read_mapping
    from secateur.training.recover import recover as run
    from secateur.training.recovery_options import Recovery

    values = put_over(read_mapping(options, Recovery.noun) if options else {}, given)
    chosen = Recovery.from_mapping(values)
    if estimate:
        from secateur.estimation.training import estimate_recovery

        needs = estimate_recovery(
            model, chosen, teacher=teacher, trust_remote_code=trust_remote_code
        )
        show_needs(needs, as_json)
        return
    with progress_bars() as progress:
        result = run(
            model,
            output,
            chosen,
            teacher=teacher,
            data=data,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    notes = [f"block {each.index}: {note}" for each in result.report.blocks for note in each.notes]
    show_result(recovery_table(result.report), [*notes, *result.report.notes], output)
