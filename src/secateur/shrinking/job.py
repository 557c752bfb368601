"""A run of shrinking whose inputs have been checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.models.checkpoint import Checkpoint
from secateur.models.locate import load_model, load_tokenizer
from secateur.models.selection import choose_linears
from secateur.models.structure import check_length, embedding_rows
from secateur.report.documents.shrink import (
    LatencyReport,
    RoundReport,
    SubBlockReport,
    SurveyReport,
)
from secateur.runs.device import resolve_device, resolve_dtype
from secateur.runs.errors import SecateurError
from secateur.runs.files import fingerprint_files
from secateur.runs.progress import Progress
from secateur.runs.run import Run, check_apart, check_space, decides
from secateur.shrinking.layout import plan_layout
from secateur.shrinking.options import ShrinkOptions, round_shares
from secateur.shrinking.source import Source, open_source
from secateur.shrinking.stock import percent_below, uniform_widths
from secateur.shrinking.sub_models import check_cuttable
from secateur.shrinking.units import (
    SubBlock,
    Width,
    all_units,
    block_parameters,
    find_sub_blocks,
    kept_parameters,
)
from secateur.shrinking.widths import width_grids
from secateur.text.calibration import Calibration, Draft, read_calibration, source_files
from secateur.text.encoder import Encoder
from secateur.text.saved import calibrate_once, read_first


@dataclass(frozen=True)
class Target:
    """How much goes.

    Attributes:
        budget: parameters to remove.
        widths: to which each sub-block is cut; None leaves that to the preset.
    """

    budget: int
    widths: list[Width] | None


@dataclass(frozen=True)
class Job:
    """What a run works on.

    Attributes:
        name: of the model, as the user gave it.
        source: the dense checkpoint.
        sub_blocks: its sub-blocks, those that stay whole among them.
        target: how much goes.
        options: what the user said.
        device: of forward passes.
        dtype: of forward passes.
        run: the output folder.
        first: calibration text that has been read already.
        read: reads it once more.
    """

    name: str
    source: Source
    sub_blocks: list[SubBlock]
    target: Target
    options: ShrinkOptions
    device: torch.device
    dtype: torch.dtype
    run: Run
    first: Draft | None
    read: Callable[[], Draft]

    @property
    def free(self) -> list[SubBlock]:
        """The sub-blocks that may be cut."""
        return _free(self.sub_blocks)

    def grids(self) -> list[list[Width]]:
        """Widths that the free sub-blocks may have in the default preset."""
        options = self.options
        return width_grids(self.free, options.grid, whole_groups=options.whole_groups)

    def load(self) -> PreTrainedModel:
        """Load the dense model as a whole."""
        trust = self.source.trust_remote_code
        return load_model(self.source.folder, self.dtype, self.device, trust_remote_code=trust)

    def calibrate(
        self, model_loader: Callable[[], PreTrainedModel], progress: Progress
    ) -> Calibration:
        """Return the run's calibration text; what is missing of it is written by the model."""
        return calibrate_once(self.run, self.first, self.read, model_loader, progress)


@dataclass(frozen=True)
class Chosen:
    """What a preset decided.

    Attributes:
        kept: what stays of each sub-block, as ``units`` has it.
        sub_blocks: what the report says of each.
        tokens: that went through forward passes.
        calibration: what the report says of the text.
        resumed: rounds or blocks that an earlier session had finished.
        refitted: folder of parameters with new values (``read_refitted``), if there are any.
        rounds: of the paper's preset.
        survey: of the default preset, if it chose the widths.
        latency: if it chose them by their time.
        notes: for the user.
    """

    kept: list[Tensor]
    sub_blocks: list[SubBlockReport]
    tokens: int
    calibration: dict[str, Any]
    resumed: int
    refitted: Path | None = None
    rounds: Sequence[RoundReport] = ()
    survey: SurveyReport | None = None
    latency: LatencyReport | None = None
    notes: Sequence[str] = ()


@contextmanager
def taken(
    name: str | Path,
    output: Path,
    options: ShrinkOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    restart: bool,
    trust_remote_code: bool,
    progress: Progress,
    *,
    curve: bool = False,
) -> Iterator[Job]:
    """Check everything that can be checked before work starts, then hold the output folder.

    For a ``curve`` nothing is to go yet, and any target will do.

    Raises:
        SecateurError: the model cannot be cut, the target not be met, the result not be stored,
            or the folder holds something else.
    """
    check_apart(output, name)
    earlier = Run.look(output, restart=restart)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    source = open_source(
        name,
        trust_remote_code=trust_remote_code,
        save_dtype=options.save_dtype,
        progress=progress,
    )
    sub_blocks = choose_sub_blocks(source, options)
    if options.preset == "default":
        width_grids(_free(sub_blocks), options.grid, whole_groups=options.whole_groups)
    target = Target(0, None) if curve else _target(source, sub_blocks, options)
    kinds = {each.kind for each in _free(sub_blocks)}
    alike = [each for each in sub_blocks if each.kind in kinds]
    check_cuttable(source.store(device), alike, queries=not _whole_groups(options))
    check_length(source.blocks.model.config, options.calibration.length)
    if not curve:
        size = source.reader.bytes_of(source.reader.files)
        check_space(output, round(size * (1 - options.sparsity)), output.glob("model-*"))
    own = tokenizer or load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    rows = embedding_rows(source.blocks.model)
    encoder = Encoder.of(own, options.calibration.bos, rows)
    deciding = options.model_dump(mode="json", exclude={"device", "dtype"})
    deciding["calibration"]["bos"] = encoder.bos
    fingerprint = decides(
        model=source.reader.fingerprint(),
        options=deciding,
        **{"calibration text": fingerprint_files(source_files(options.calibration))},
        forward=f"{dtype} on {device.type}",
        result="curve" if curve else "model",
    )
    read = partial(_read_text, options, encoder, progress)
    first = read_first(earlier, read)
    with Run.take(output, fingerprint, restart=restart) as run:
        yield Job(str(name), source, sub_blocks, target, options, device, dtype, run, first, read)


def choose_sub_blocks(source: Checkpoint, options: ShrinkOptions) -> list[SubBlock]:
    """The sub-blocks of a model, those fixed that the options leave whole.

    Raises:
        SecateurError: a pattern matches nothing, or nothing is left to cut.
    """
    blocks = choose_linears(source.blocks, options.only, options.skip)
    sub_blocks = find_sub_blocks(blocks, ffn_only=options.ffn_only)
    if not _free(sub_blocks):
        raise SecateurError(
            "--only and --skip leave whole every attention and feed-forward that could be cut, one "
            "of its linears is enough for that; skip less, or let --only match all linears of one."
        )
    return sub_blocks


def _free(sub_blocks: Sequence[SubBlock]) -> list[SubBlock]:
    return [each for each in sub_blocks if not each.fixed]


def _read_text(options: ShrinkOptions, encoder: Encoder, progress: Progress) -> Draft:
    samples = options.calibration.samples
    if options.preset == "paper":
        # Every round has text of its own.
        samples *= len(round_shares(options.sparsity, options.step))
    wanted = options.calibration.model_copy(update={"samples": samples})
    return read_calibration(wanted, encoder, progress)


def _target(source: Source, sub_blocks: Sequence[SubBlock], options: ShrinkOptions) -> Target:
    """How much is to go, once it is certain that the result can be stored."""
    total = block_parameters(source.blocks)
    budget = round(options.sparsity * total)
    free = _free(sub_blocks)
    costs = [sub_block.unit_parameters for sub_block in free]
    removable = kept_parameters(free, all_units(free))
    most = removable - min(costs)
    if budget > most:
        left = "the model" if len(free) == len(sub_blocks) else "all that --only and --skip leave"
        kind = "feed-forwards" if options.ffn_only else "units that can be removed"
        raise SecateurError(
            f"Removing {options.sparsity:.1%} of the blocks' parameters would empty {left}, its "
            f"{kind} hold {removable / total:.1%} of them; remove {percent_below(most / total)} or "
            "less."
        )
    if budget < min(costs):
        raise SecateurError(
            f"{options.sparsity:.4%} of the blocks' parameters are less than the smallest unit; "
            f"remove {min(costs) / total:.4%} or more."
        )
    if options.form == "uniform":
        _check_alike(sub_blocks)
        widths = uniform_widths(
            source,
            sub_blocks,
            budget,
            options.sparsity,
            whole_groups=_whole_groups(options),
            grid=options.grid,
        )
        return Target(budget, widths)
    plan_layout(source, sub_blocks, [each.whole for each in sub_blocks], options.form)
    return Target(budget, None)


def _check_alike(sub_blocks: Sequence[SubBlock]) -> None:
    """Refuse to leave attention or feed-forward whole in some blocks alone."""
    for kind, name in (("attention", "attention"), ("ffn", "feed-forward")):
        if len({each.fixed for each in sub_blocks if each.kind == kind}) > 1:
            raise SecateurError(
                f"--only and --skip leave the {name} whole in some blocks, and --uniform cuts all "
                f"blocks to the same widths; leave the {name} whole in all of them, or leave out "
                "--uniform."
            )


def _whole_groups(options: ShrinkOptions) -> bool:
    """Whether no query head goes without its group; in the paper's preset none does."""
    return options.whole_groups or options.preset == "paper"


def describe_sub_block(sub_block: SubBlock, width: Width, **others: Any) -> SubBlockReport:
    """Say what is left of a sub-block, and what else is known of it."""
    return SubBlockReport(
        block=sub_block.block,
        kind=sub_block.kind,
        kept=width.units,
        of=sub_block.units,
        queries=width.queries or None,
        queries_of=sub_block.heads_per_unit or None,
        parameters=sub_block.parameters(width),
        **others,
    )
