"""What a pruning run works on, checked before it starts."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.allocation.plan_file import FromFile
from secateur.methods.quantize import Quantize
from secateur.models.checkpoint import Checkpoint
from secateur.models.formats.packed import check_packable
from secateur.models.locate import load_model, load_tokenizer
from secateur.models.masks import KeptMasks
from secateur.models.resident import ResidentStore
from secateur.models.skeleton import check_length
from secateur.models.store import BlockStore
from secateur.models.streamed import StreamedStore, saved_bytes
from secateur.models.structure import find_blocks
from secateur.patterns.plan import Plan
from secateur.pruning.recipe import Recipe
from secateur.runs.device import resolve_device, resolve_dtype
from secateur.runs.errors import SecateurError
from secateur.runs.machine import package_versions
from secateur.runs.run import Run, check_apart, fingerprint_files
from secateur.text import source_files


@dataclass
class Job:
    """A run whose inputs have been checked.

    The plan has the right sizes and total from the beginning; its zeros are divided once there
    is calibration text.
    """

    name: str
    store: BlockStore
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    load_dense: Callable[[], PreTrainedModel]
    device: torch.device
    dtype: torch.dtype
    run: Run | None
    streamed: bool
    in_memory: bool
    trust_remote_code: bool = False
    kept: KeptMasks | None = None
    notes: list[str] = field(default_factory=list)


def job_in_memory(
    model: PreTrainedModel,
    recipe: Recipe,
    output: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Job:
    """Check a model in memory; arguments as for ``prune``."""
    if tokenizer is None:
        raise SecateurError(
            "Pruning a model in memory needs its tokenizer for calibration text; pass tokenizer=."
        )
    device = resolve_device(recipe.device)
    blocks = find_blocks(model.eval())
    if recipe.quantize is not None:
        recipe.quantize.check_widths(blocks)
        _check_unpacked(recipe.quantize, "pruning a model in memory")
    plan = recipe.allocation.prepare(blocks, recipe.pattern)
    check_length(blocks.model.config, recipe.calibration.length)
    # Weights in memory have no fingerprint that is worth its time, so such a run starts afresh.
    run = Run.open(output, {"model": str(time.time_ns())}, restart=False) if output else None
    store = ResidentStore(blocks, output, device)
    kept = KeptMasks(None) if recipe.keeps_masks else None
    return Job(
        name=model.config._name_or_path or type(model).__name__,
        store=store,
        plan=plan if kept is None else kept.plan(store),
        tokenizer=tokenizer,
        load_dense=lambda: model,
        device=device,
        dtype=resolve_dtype(recipe.dtype, device),
        run=run,
        streamed=False,
        in_memory=True,
        kept=kept,
    )


def check_quantize(stage: Quantize, source: Checkpoint) -> None:
    """Raise SecateurError if the grid or the format does not take the model."""
    stage.check_widths(source.blocks)
    if isinstance(source.mapped, str):
        _check_unpacked(stage, f"this one ({source.mapped})")
    if stage.format == "packed":
        check_packable(source.blocks)


def _check_unpacked(stage: Quantize, what: str) -> None:
    if stage.format == "packed":
        raise SecateurError(
            f"Packed weights need a checkpoint that is read block by block, and {what} is not "
            "that; use --quantized-format dequantized."
        )


@dataclass(frozen=True)
class _Inputs:
    """A checkpoint and a recipe that fit each other; nothing large has been read."""

    source: Checkpoint
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    texts: list[Path]
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    kept: KeptMasks | None

    @classmethod
    def check(
        cls,
        name: str | Path,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
    ) -> _Inputs:
        device = resolve_device(recipe.device)
        dtype = resolve_dtype(recipe.dtype, device)
        source = Checkpoint.open(name, trust_remote_code=trust_remote_code, by_block=False)
        folder, blocks = source.folder, source.blocks
        if recipe.quantize is not None:
            check_quantize(recipe.quantize, source)
        plan = recipe.allocation.prepare(blocks, recipe.pattern)
        check_length(blocks.model.config, recipe.calibration.length)
        return cls(
            source=source,
            plan=plan,
            tokenizer=tokenizer or load_tokenizer(folder, trust_remote_code=trust_remote_code),
            texts=source_files(recipe.calibration),
            recipe=recipe,
            device=device,
            dtype=dtype,
            kept=KeptMasks(folder) if recipe.keeps_masks else None,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        blocks = len(self.source.blocks)
        return {
            "model": self.source.reader.fingerprint(),
            "recipe": _deciding_options(self.recipe, self.plan),
            "calibration text": fingerprint_files(self.texts),
            "masks": fingerprint_files(self.kept.files(blocks)) if self.kept else None,
            "forward": f"{self.dtype} on {self.device.type}",
            "versions": package_versions(),
        }


def fingerprint_run(
    model: str | Path, recipe: Recipe, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Check the inputs of a run as ``prune`` does, and say all that decides its result.

    Raises:
        SecateurError: whatever ``prune`` would raise before it reads weights or writes.
    """
    return _Inputs.check(model, recipe, None, trust_remote_code).fingerprint()


def job_from_checkpoint(
    name: str | Path,
    recipe: Recipe,
    output: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    restart: bool,
    trust_remote_code: bool,
) -> Job:
    """Check a checkpoint and take the output folder, if one is named; arguments of ``prune``."""
    given = _Inputs.check(name, recipe, tokenizer, trust_remote_code)
    source, device, dtype = given.source, given.device, given.dtype
    run = None
    if output is not None:
        check_apart(output, source.folder)
        run = Run.open(output, given.fingerprint(), restart=restart)
        size = saved_bytes(source.blocks, source.reader, source.mapped, recipe.packing)
        _check_space(run, size)

    load = partial(load_model, source.folder, trust_remote_code=trust_remote_code)

    notes: list[str] = []
    store: BlockStore
    if isinstance(source.mapped, str):
        notes.append(f"The whole model was loaded instead of one block at a time: {source.mapped}.")
        resident = load("auto")
        store = ResidentStore(find_blocks(resident), output, device, side_files=source.folder)
    else:
        resident = None
        store = source.store(device, output, recipe.packing)
    return Job(
        name=str(name),
        store=store,
        plan=given.plan if given.kept is None else given.kept.plan(store),
        tokenizer=given.tokenizer,
        load_dense=lambda: load(dtype, device) if resident is None else resident,
        device=device,
        dtype=dtype,
        run=run,
        streamed=isinstance(store, StreamedStore),
        in_memory=False,
        trust_remote_code=trust_remote_code,
        kept=given.kept,
        notes=notes,
    )


def _deciding_options(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The options that change the bytes of the result; resolved ones are recorded apart."""
    options = recipe.model_dump(mode="json")
    for name in ("device", "dtype", "activation_memory"):
        options.pop(name)
    if isinstance(recipe.allocation, FromFile):
        # What a plan file says decides, not where it lies.
        options["allocation"]["file"] = hashlib.sha256(plan.to_json().encode()).hexdigest()
    return options


def _check_space(run: Run, size: int) -> None:
    """Find out now, not hours later, that the checkpoint will not fit on the disk."""
    have = shutil.disk_usage(run.output).free
    present = sum(path.stat().st_size for path in run.output.glob("model-*.safetensors"))
    need = size - present
    if have < need:
        raise SecateurError(
            f"The result needs {need / 1e9:.1f} GB and the disk of {run.output} has "
            f"{have / 1e9:.1f} GB free; free some space or choose another disk."
        )
