"""What a pruning run works on: first its checked inputs, then with the store that gives blocks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.allocation.plan import GivenPlan
from secateur.models.checkpoint import Checkpoint
from secateur.models.locate import load_model, load_tokenizer
from secateur.models.masks import KeptMasks
from secateur.models.resident import ResidentStore
from secateur.models.selection import choose_linears
from secateur.models.store import BlockStore
from secateur.models.structure import BlockList, check_length, embedding_rows
from secateur.models.text_path import find_blocks
from secateur.patterns.plan import Plan
from secateur.pruning.recipe import Recipe
from secateur.runs.device import resolve_device, resolve_dtype
from secateur.runs.errors import SecateurError
from secateur.runs.files import fingerprint_files
from secateur.runs.progress import Progress, silent
from secateur.runs.run import Run, check_space, decides
from secateur.text.calibration import Calibration, Draft, read_calibration, source_files
from secateur.text.encoder import Encoder
from secateur.text.saved import calibrate_once


@dataclass(frozen=True)
class Inputs:
    """A model and a recipe that fit each other; nothing large has been read.

    Attributes:
        name: of the model, as the user gave it.
        recipe: what to do.
        blocks: the model's structure.
        source: its checkpoint, None for a model in memory.
        plan: the sizes of all linears and the zeros in all, which are divided later.
        encoder: for calibration text.
        device: where to compute.
        dtype: of forward passes.
        trust_remote_code: let the checkpoint's own Python code run.
    """

    name: str
    recipe: Recipe
    blocks: BlockList
    source: Checkpoint | None
    plan: Plan
    encoder: Encoder
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool

    @classmethod
    def of_checkpoint(
        cls,
        name: str | Path,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
        progress: Progress = silent,
    ) -> Inputs:
        """Check a checkpoint against a recipe; arguments of ``prune``."""
        device = resolve_device(recipe.device)
        dtype = resolve_dtype(recipe.dtype, device)
        source = Checkpoint.open(
            name,
            trust_remote_code=trust_remote_code,
            save_dtype=recipe.save_dtype,
            progress=progress,
        )
        source = source.choosing(recipe.only, recipe.skip)
        check_saving(recipe, source.blocks, source)
        plan = recipe.allocation.prepare(source.blocks, recipe.pattern)
        check_length(source.blocks.model.config, recipe.calibration.length)
        if tokenizer is None:
            tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
        rows = embedding_rows(source.blocks.model)
        return cls(
            str(name),
            recipe,
            source.blocks,
            source,
            plan,
            Encoder.of(tokenizer, recipe.calibration.bos, rows),
            device,
            dtype,
            trust_remote_code,
        )

    @classmethod
    def of_model(
        cls, model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
    ) -> Inputs:
        """Check a model in memory against a recipe; arguments of ``prune``."""
        if tokenizer is None:
            raise SecateurError(
                "Pruning a model in memory needs its tokenizer for calibration text; pass "
                "tokenizer=."
            )
        device = resolve_device(recipe.device)
        blocks = choose_linears(find_blocks(model.eval()), recipe.only, recipe.skip)
        check_saving(recipe, blocks, None)
        plan = recipe.allocation.prepare(blocks, recipe.pattern)
        check_length(blocks.model.config, recipe.calibration.length)
        name = model.config._name_or_path or type(model).__name__
        dtype = resolve_dtype(recipe.dtype, device)
        encoder = Encoder.of(tokenizer, recipe.calibration.bos, embedding_rows(model))
        return cls(name, recipe, blocks, None, plan, encoder, device, dtype, False)

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        assert self.source is not None, "a model in memory lies in no folder"
        return self.source.folder

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result of a checkpoint."""
        assert self.source is not None, "weights in memory have no fingerprint worth its time"
        options = self.recipe.model_dump(mode="json")
        # What these resolve to is recorded below, or decides nothing.
        for name in ("device", "dtype", "activation_memory"):
            options.pop(name)
        options["calibration"]["bos"] = self.encoder.bos
        if isinstance(self.recipe.allocation, GivenPlan):
            # What a plan file says decides, not where it lies.
            plan = self.plan.to_json().encode()
            options["allocation"]["file"] = hashlib.sha256(plan).hexdigest()
        masks = None
        if self.recipe.keeps_masks:
            masks = fingerprint_files(KeptMasks(self.source.folder).files(len(self.blocks)))
        return decides(
            model=self.source.reader.fingerprint(),
            recipe=options,
            **{"calibration text": fingerprint_files(source_files(self.recipe.calibration))},
            masks=masks,
            forward=f"{self.dtype} on {self.device.type}",
        )

    def check_space(self, output: Path) -> None:
        """Raise SecateurError if the result does not fit on the disk of the output folder."""
        assert self.source is not None
        size = self.source.saved_bytes(self.recipe.weight_format, self.plan.zeros)
        check_space(output, size, output.glob("model-*.safetensors"))

    def load_dense(self) -> PreTrainedModel:
        """Load the whole checkpoint, in the dtype of forward passes."""
        assert self.source is not None
        return load_model(
            self.source.folder, self.dtype, self.device, trust_remote_code=self.trust_remote_code
        )

    def read_text(self, progress: Progress) -> Draft:
        """Read all calibration text that the model does not write."""
        return read_calibration(self.recipe.calibration, self.encoder, progress)

    def open(self, run: Run | None, first: Draft | None = None) -> Job:
        """Open the store."""
        output = None if run is None else run.output
        store: BlockStore
        if self.source is None:
            store = ResidentStore(self.blocks, output, self.device)
        else:
            store = self.source.store(self.device, output, self.recipe.weight_format)
            if run is not None:
                store.check_outside()
        kept, plan = None, self.plan
        if self.recipe.keeps_masks:
            kept = KeptMasks(None if self.source is None else self.source.folder)
            plan = kept.plan(store)
        return Job(self, store, plan, run, kept, first)


@dataclass(frozen=True)
class Job:
    """Inputs whose blocks can be read.

    Attributes:
        inputs: what was checked.
        store: gives out blocks and takes them back.
        plan: the zeros in all; of kept masks, of each linear.
        run: the output folder, None without one.
        kept: the masks that the checkpoint has, if they are to stay.
        first: calibration text that has been read already.
    """

    inputs: Inputs
    store: BlockStore
    plan: Plan
    run: Run | None
    kept: KeptMasks | None
    first: Draft | None

    @property
    def folder(self) -> Path | None:
        """Where large temporary files may go."""
        return None if self.run is None else self.run.folder

    def calibrate(self, progress: Progress) -> Calibration:
        """Return the run's calibration text; what is missing of it is written by the model."""
        inputs = self.inputs

        def dense() -> PreTrainedModel:
            return self.store.blocks.model if inputs.source is None else inputs.load_dense()

        read = partial(inputs.read_text, progress)
        return calibrate_once(self.run, self.first, read, dense, progress)


def check_saving(recipe: Recipe, blocks: BlockList, source: Checkpoint | None) -> None:
    """Raise SecateurError if the grid or the format of the result does not take the model.

    Args:
        recipe: what to do.
        blocks: of the model.
        source: its checkpoint, None for a model in memory.
    """
    if source is None and recipe.save_dtype != "source":
        raise SecateurError(
            "A model in memory is saved in the dtype it has; convert it with model.to() and leave "
            "save_dtype out."
        )
    if recipe.quantize is not None:
        recipe.quantize.check_widths(blocks)
    why = "it was given in memory" if source is None else source.tensors.joined
    recipe.weight_format.check(blocks, recipe.pattern, why)


def fingerprint_run(
    model: str | Path, recipe: Recipe, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Check the inputs of a run as ``prune`` does, and say all that decides its result.

    Raises:
        SecateurError: whatever ``prune`` would raise before it reads weights or writes.
    """
    return Inputs.of_checkpoint(model, recipe, None, trust_remote_code).fingerprint()
