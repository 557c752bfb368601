"""What every weight format promises, over the registered ones; a new one is tested from here on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from fresh import logits_of
from interruption import interrupted_after
from secateur.models.checkpoint import Checkpoint
from secateur.models.formats import FORMATS, format
from secateur.models.formats.format import (
    WEIGHT,
    FinishedLinear,
    Stored,
    WeightFormat,
    find_format,
    recognise,
    stored_name,
)
from secateur.models.formats.plain import Plain
from secateur.models.locate import load_config
from secateur.models.masks import block_masks
from secateur.models.reader import CheckpointReader
from secateur.models.structure import find_linears
from secateur.patterns.pattern import Budget, Pattern, parse_pattern, select
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError
from secateur.solvers.grids import GridOptions, make_grid, round_to_grid
from tiny import FAMILIES

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = {
    "no grid": None,
    "int4": GridOptions(4, 16, True),
    "int4 by row, zero points": GridOptions(4, 0, False),
    "int3, zero points": GridOptions(3, 8, False),
    "int8 by row": GridOptions(8, 0, True),
}
# Without the other names that some have.
NAMES = [name for name in FORMATS if find_format(name).name == name]
PATTERNS = ("0.5", "0.37", "2:4", "0.0")
# Patterns of whole models; those of single linears are all of them.
SAVED = ("0.37", "2:4")
# Odd widths and heights, one row, one column; the last is too small for groups and n:m.
SHAPES = ((24, 32), (1, 32), (33, 48), (7, 33), (5, 1))


def one_sentence(caught: pytest.ExceptionInfo[SecateurError]) -> str:
    message = str(caught.value)
    assert message.endswith("."), message
    assert "\n" not in message
    assert ". " not in message, message
    return message


@dataclass(frozen=True)
class Case:
    """A format, a grid that it holds or does without, and a pattern."""

    format: WeightFormat
    grid: GridOptions | None
    pattern: Pattern


def held(checkpoints: Callable[..., Path], name: str) -> dict[str, Case]:
    """What a format says it can hold."""
    blocks = Checkpoint.at(checkpoints("llama")).blocks
    cases = {}
    for label, grid in GRIDS.items():
        for pattern in map(parse_pattern, PATTERNS):
            try:
                found = find_format(name).of(grid)
                found.check(blocks, pattern)
            except SecateurError:
                continue
            cases[f"{label}, {pattern}"] = Case(found, grid, pattern)
    return cases


def finished(
    case: Case, shape: tuple[int, int], dtype: torch.dtype, weights: str, seed: int = 0
) -> FinishedLinear:
    """A linear as the stages of a recipe leave it."""
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(shape, generator=generator)
    if weights == "ties":
        w_OI = w_OI.sign() * 0.25
    elif weights == "zeros":
        w_OI.zero_()
    budget = Budget.uniform(case.pattern, shape[:1], shape[1])
    mask_OI = select(w_OI.abs(), budget)
    if case.grid is None:
        return FinishedLinear((w_OI * mask_OI).to(dtype).float(), dtype, mask_OI)
    grid = make_grid(w_OI, mask_OI, case.grid, None, dtype)
    solution = round_to_grid(w_OI, mask_OI, grid)
    return FinishedLinear(solution.w_OI.to(dtype).float(), dtype, mask_OI, solution)


def fits(case: Case, shape: tuple[int, int]) -> bool:
    groups = case.grid is None or not case.grid.group or shape[1] % case.grid.group == 0
    return groups and (":" not in str(case.pattern) or shape[1] % 4 == 0)


@pytest.mark.parametrize("weights", ["random", "ties", "zeros"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_linear_comes_back_as_it_was_and_takes_the_tensors_that_were_announced(
    name: str, dtype: torch.dtype, weights: str, checkpoints: Callable[..., Path]
) -> None:
    cases = held(checkpoints, name)
    assert cases, "a format holds something"
    for label, case in cases.items():
        for shape in (shape for shape in SHAPES if fits(case, shape)):
            linear = finished(case, shape, dtype, weights)
            pieces = case.format.encode(linear)
            assert pieces.keys() <= set(case.format.pieces or [WEIGHT])
            stored = {key: Stored(tuple(each.shape), each.dtype) for key, each in pieces.items()}
            kept = int(linear.mask_OI.sum())
            assert stored == case.format.layout(shape, dtype, kept), (label, shape)
            assert case.format.weight(stored, pieces.__getitem__) == Stored(shape, dtype)
            found_OI = case.format.decode(pieces)
            assert found_OI.dtype == dtype
            assert torch.equal(found_OI, linear.weight_OI.to(dtype)), (label, shape)
            assert not found_OI[~linear.mask_OI].any()


@dataclass(frozen=True)
class Saved:
    """A checkpoint in a format, and what is in it."""

    case: Case
    source: Path
    folder: Path
    weights: dict[str, Tensor]
    zeros: dict[str, int]


def save(case: Case, source: Path, folder: Path) -> Saved:
    """Prune a checkpoint at random through the store, and say what it should hold."""
    checkpoint = Checkpoint.at(source)
    store = checkpoint.store(CPU, folder, case.format)
    weights, zeros = checkpoint.reader.read(checkpoint.reader.files), {}
    for index in range(len(checkpoint.blocks)):
        block = store.load(index)
        masks, quantised = {}, {}
        for number, linear in enumerate(find_linears(block)):
            (file,) = checkpoint.tensors.blocks[index].files_of(f"{linear.name}.weight")
            dtype = checkpoint.reader.dtypes[file]
            shape = tuple(linear.weight_OI.shape)
            seed = 100 * index + number
            new = finished(case, shape, dtype, "random", seed)
            linear.weight_OI.copy_(new.weight_OI)
            masks[linear.name] = new.mask_OI
            if new.quantised is not None:
                quantised[linear.name] = new.quantised
            weights[file] = (new.weight_OI.T if linear.transposed else new.weight_OI).to(dtype)
            zeros[f"{checkpoint.blocks.name(index)}.{linear.name}"] = int((~new.mask_OI).sum())
        store.save(index, masks, quantised)
        store.release(index)
    store.finish()
    return Saved(case, source, folder, weights, zeros)


@pytest.fixture(scope="module")
def saved(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Saved]]:
    """By format, then by what it holds: models of several families."""
    everything = {}
    for name in NAMES:
        cases = held(checkpoints, name)
        families = {
            "llama": (torch.float32, [label for label in cases if label.endswith(SAVED)]),
            "qwen2": (torch.bfloat16, list(cases)[-1:]),
            "opt": (torch.bfloat16, list(cases)[:1]),
            "gpt2": (torch.float32, list(cases)[:1]),
        }
        everything[name] = {}
        for family, (dtype, labels) in families.items():
            source = checkpoints(family, dtype)
            for label in labels:
                case, folder = cases[label], tmp_path_factory.mktemp("saved") / "model"
                try:
                    case.format.check(Checkpoint.at(source).blocks, case.pattern)
                except SecateurError:
                    assert family != "llama"
                    continue
                everything[name][f"{family}, {label}"] = save(case, source, folder)
    return everything


def tensors_in(folder: Path) -> dict[str, tuple[str, int]]:
    """File and bytes of every tensor, as safetensors alone sees them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                found[key] = path.name, tensors.get_tensor(key).nbytes
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_reads_as_the_weights_it_was_made_of(
    name: str, saved: dict[str, dict[str, Saved]]
) -> None:
    for label, each in saved[name].items():
        reader, source = CheckpointReader(each.folder), CheckpointReader(each.source)
        assert reader.shapes == source.shapes, label
        assert reader.dtypes == source.dtypes
        found = reader.read(reader.files)
        for key, tensor in each.weights.items():
            assert torch.equal(found[key], tensor), (label, key)
            assert torch.equal(reader.mapped(key), tensor)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_bytes_in_the_files_are_those_of_the_layout(
    name: str, saved: dict[str, dict[str, Saved]]
) -> None:
    for label, each in saved[name].items():
        source = Checkpoint.at(each.source)
        expected = set(source.reader.files)
        for index, block in enumerate(source.blocks):
            for linear in (linear for linear in find_linears(block) if not linear.transposed):
                (file,) = source.tensors.blocks[index].files_of(f"{linear.name}.weight")
                full = f"{source.blocks.name(index)}.{linear.name}"
                rows, columns = linear.weight_OI.shape
                kept = rows * columns - each.zeros[full]
                layout = each.case.format.layout((rows, columns), source.reader.dtypes[file], kept)
                expected.remove(file)
                expected |= {stored_name(file, piece) for piece in layout}
        found = tensors_in(each.folder)
        assert found.keys() == expected, label
        total = sum(size for _, size in found.values())
        assert source.saved_bytes(each.case.format, each.zeros) == total
        reader = CheckpointReader(each.folder)
        assert reader.bytes_of(reader.files) == total
        index = json.loads((each.folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {key: file for key, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("name", NAMES)
def test_zeros_masks_and_pattern_are_kept(name: str, saved: dict[str, dict[str, Saved]]) -> None:
    for label, each in saved[name].items():
        counted = secateur.inspect(each.folder)
        for linear in counted.linears:
            assert linear.zeros == int((each.weights[linear.name] == 0).sum()), label
        assert counted.zeros >= sum(each.zeros.values())
        if str(each.case.pattern) == "2:4":
            assert "2:4" in counted.patterns
        opened = Checkpoint.at(each.folder, use="read")
        for index, block in enumerate(opened.blocks):
            masks = block_masks(each.folder, index, block)
            for linear in find_linears(block):
                (file,) = opened.tensors.blocks[index].files_of(f"{linear.name}.weight")
                weight = each.weights[file]
                removed = (weight.T if linear.transposed else weight)[~masks[linear.name]]
                assert len(removed) == each.zeros[f"{opened.blocks.name(index)}.{linear.name}"]
                assert not removed.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_block_is_given_out_as_it_was_saved(
    name: str, saved: dict[str, dict[str, Saved]]
) -> None:
    for label, each in saved[name].items():
        source = Checkpoint.at(each.source)
        store = source.store(CPU, each.folder, each.case.format)
        for index, part in enumerate(source.tensors.blocks):
            state = store.load_finished(index).state_dict()
            for key in part.names:
                (file,) = part.files_of(key)
                assert torch.equal(state[key], each.weights[file].to(state[key].dtype)), label


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_says_the_format_and_nothing_else_changes(
    name: str, saved: dict[str, dict[str, Saved]]
) -> None:
    for each in saved[name].values():
        config = json.loads((each.folder / "config.json").read_text())
        described = config.pop("quantization_config", None)
        source = json.loads((each.source / "config.json").read_text())
        # Positions are said for readers of both kinds.
        assert config.keys() - source.keys() <= {"rope_theta", "partial_rotary_factor"}
        assert {key: config[key] for key in source} == source
        found = recognise(described)
        assert type(found) is find_format(name)
        blocks = Checkpoint.at(each.source).blocks
        assert found.describe(blocks) == (described or {}) == each.case.format.describe(blocks)
        assert load_config(each.folder, use="read") is not None
        if not isinstance(found, Plain):
            with pytest.raises(SecateurError, match="prune the plain") as caught:
                load_config(each.folder)
            one_sentence(caught)
        if not found.loads:
            with pytest.raises(SecateurError, match="transformers does not load") as caught:
                load_config(each.folder, use="load")
            one_sentence(caught)


@pytest.mark.slow
def test_transformers_loads_what_claims_so(
    saved: dict[str, dict[str, Saved]], tmp_path: Path
) -> None:
    folders = {}
    for name in (name for name in NAMES if find_format(name).loads):
        for label, each in saved[name].items():
            plain = tmp_path / f"{name} {label}"
            shutil.copytree(each.source, plain)
            path = plain / "model.safetensors"
            tensors = {key: each.weights[key].contiguous() for key in load_file(path)}
            save_file(tensors, path, metadata={"format": "pt"})
            folders |= {f"{name} {label}": each.folder, f"{name} {label}, expected": plain}
    logits = logits_of(folders, tmp_path)
    for name in (name for name in folders if not name.endswith(", expected")):
        assert torch.equal(logits[name], logits[f"{name}, expected"]), name


def damage_copy(
    whole: Path, folder: Path, name: str, change: Callable[[Tensor], Tensor] | None
) -> None:
    """Copy a checkpoint with one of its tensors changed, or without it."""
    shutil.copytree(whole, folder)
    path = folder / tensors_in(folder)[name][0]
    tensors = load_file(path)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    if change is None:
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_text())
        del listed["weight_map"][name]
        index.write_text(json.dumps(listed))


DAMAGES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "missing": None,
    "longer": lambda tensor: torch.cat([tensor, tensor]),
    "flat": lambda tensor: tensor.flatten()[:1],
    "of another dtype": lambda tensor: tensor.to(torch.int16),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [name for name in NAMES if find_format(name).pieces])
def test_a_damaged_piece_is_named_in_one_sentence(
    name: str, damage: str, saved: dict[str, dict[str, Saved]], tmp_path: Path
) -> None:
    for number, each in enumerate(saved[name].values()):
        weight = next(key for key in each.weights if key.endswith("fc1.weight") or "up_proj" in key)
        stored = tensors_in(each.folder)
        pieces = [
            piece for piece in each.case.format.pieces if stored_name(weight, piece) in stored
        ]
        assert pieces
        for piece in pieces:
            folder = tmp_path / f"{number} {piece}"
            damage_copy(each.folder, folder, stored_name(weight, piece), DAMAGES[damage])
            with pytest.raises(SecateurError) as caught:
                CheckpointReader(folder).read([weight])
            message = one_sentence(caught)
            assert weight in message
            assert piece in message


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_its_place_or_is_refused_before_work(
    name: str, checkpoints: Callable[..., Path]
) -> None:
    (case, *_) = held(checkpoints, name).values()
    for family in FAMILIES:
        try:
            case.format.check(Checkpoint.at(checkpoints(family)).blocks, case.pattern)
        except SecateurError as error:
            assert case.format.otherwise in str(error), family
    blocks = Checkpoint.at(checkpoints("llama")).blocks
    if not isinstance(case.format, Plain):
        with pytest.raises(SecateurError, match="a tensor of its own") as caught:
            case.format.check(blocks, case.pattern, "it was given in memory")
        assert case.format.otherwise in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if find_format(name).package])
def test_a_missing_package_is_named_before_work(
    name: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (case, *_) = held(checkpoints, name).values()
    monkeypatch.setattr(format, "find_spec", lambda name: None)
    with pytest.raises(SecateurError, match=case.format.package[0]) as caught:
        case.format.check(Checkpoint.at(checkpoints("llama")).blocks, case.pattern)
    assert case.format.package[1] in one_sentence(caught)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_the_format_and_an_interrupted_run_ends_with_the_same_files(
    name: str, checkpoints: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    case = list(held(checkpoints, name).values())[-1]
    quantize = {"method": "quantize", "format": name}
    if case.grid is not None:
        quantize |= {
            "bits": case.grid.bits,
            "group": case.grid.group,
            "symmetric": case.grid.symmetric,
        }
    values = {
        "pattern": str(case.pattern),
        "stages": [{"method": "wanda"}],
        "calibration": {"source": str(text_file), "samples": 8, "length": 32},
    }
    recipe = Recipe.from_mapping({**values, "stages": [*values["stages"], quantize]})
    assert isinstance(recipe.weight_format, find_format(name))
    if case.grid is None:
        recipe = Recipe.from_mapping({**values, "format": name})
        assert isinstance(recipe.weight_format, find_format(name))
    secateur.prune(checkpoints(), recipe, tmp_path / "whole")
    with interrupted_after(2):
        secateur.prune(checkpoints(), recipe, tmp_path / "resumed")
    secateur.prune(checkpoints(), recipe, tmp_path / "resumed")
    for path in (tmp_path / "whole").glob("model*"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()
    size = sum(size for _, size in tensors_in(tmp_path / "whole").values())
    assert secateur.estimate(checkpoints(), recipe).output_bytes == size


def test_every_format_has_a_name_of_its_own_and_a_page() -> None:
    assert {find_format(name) for name in NAMES} == {find_format(name) for name in FORMATS}
    pages = Path(__file__).parents[2] / "docs" / "formats"
    for name in NAMES:
        page = f"{name}.md"
        assert (pages / page).is_file(), f"docs/formats/{page} is missing"
        assert f"({page})" in (pages / "index.md").read_text(), f"{page} has no row in the table"
