"""Which tensors of the files make which parameters, by transformers' own rules.

Names in the files are often those of the parameters. For some families transformers converts what
it reads: names change, experts are stacked, matrices are joined or split. The same rules, read
backwards, say how changed parameters are stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from secateur.models.reader import CheckpointReader
from secateur.models.structure import BlockList


@dataclass
class Group:
    """Tensors of the files and the parameters that are made of them.

    Attributes:
        key: full name of the first parameter.
        files: names in the files, in the order in which they are joined.
        parameters: full names in the model.
        conversion: how the tensors become parameters; None if nothing but the name may differ.
        patterns: of each tensor, the pattern of the conversion that it meets.
        known_as: of each tensor, the name that the conversion gives it on the way back.
        trouble: why the parameters cannot be stored as they were; None if they can.
    """

    key: str
    files: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    conversion: WeightConverter | None = None
    patterns: list[str] = field(default_factory=list)
    known_as: list[str] = field(default_factory=list)
    trouble: str | None = None

    def load(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the parameters, by full name, of the tensors of the files."""
        if self.conversion is None:
            return {self.key: tensors[self.files[0]]}
        mixed = len({tensors[file].dtype for file in self.files}) > 1
        conversion = deepcopy(self.conversion)
        for file, pattern in zip(self.files, self.patterns, strict=True):
            tensor = tensors[file].float() if mixed else tensors[file]
            conversion.add_tensor(self.key, file, pattern, cast(Any, tensor))
        return _converted(conversion, self.key, model)

    def store(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the tensors of the files of the parameters, by full name."""
        if self.conversion is None:
            return {self.files[0]: state[self.key]}
        made = self.split(model, state)
        return {file: made[known] for file, known in zip(self.files, self.known_as, strict=True)}

    def split(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go the conversion's way back, to the names that the conversion gives.

        Raises:
            ValueError: the conversion has no way back.
        """
        assert self.conversion is not None, "a name needs no way back"
        back = cast(WeightConverter, self.conversion.reverse_transform())
        key = ""
        for name in self.parameters:
            renamed, pattern = back.rename_source_key(name)
            if pattern is None:
                raise ValueError(f"{name} has no way back")
            key = key or renamed
            back.add_tensor(renamed, name, pattern, cast(Any, state[name]))
        return _converted(back, key, model)


class Origin(NamedTuple):
    """Where a parameter comes from: the group that makes it, under a full name."""

    group: Group
    name: str


class Part:
    """The parameters and persistent buffers of a part of a model, by name inside the part."""

    def __init__(self, model: PreTrainedModel, origins: Mapping[str, Origin]) -> None:
        self._model = model
        self._origins = dict(origins)
        groups = {id(each.group): each.group for each in origins.values()}
        self.groups = list(groups.values())

    @property
    def names(self) -> list[str]:
        """All names inside the part."""
        return list(self._origins)

    @property
    def files(self) -> list[str]:
        """Names in the files of all that the part is made of."""
        return [file for group in self.groups for file in group.files]

    def files_of(self, name: str) -> list[str]:
        """Names in the files of what makes a parameter, maybe together with others."""
        return self._origins[name].group.files

    def file_of(self, name: str) -> str | None:
        """Name in the files of the tensor that is this parameter; None if it is converted."""
        group = self._origins[name].group
        return group.files[0] if group.conversion is None else None

    def read(
        self, reader: CheckpointReader, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Read parameters, all if none are named, in the dtypes of the files."""
        origins = {name: self._origins[name] for name in (names or self._origins)}
        groups = {id(each.group): each.group for each in origins.values()}.values()
        made: dict[str, Tensor] = {}
        plain = {each.key: each.files[0] for each in groups if each.conversion is None}
        tensors = reader.read(plain.values())
        made |= {key: tensors[file] for key, file in plain.items()}
        for group in groups:
            if group.conversion is not None:
                made |= group.load(self._model, reader.read(group.files))
        return {name: made[each.name] for name, each in origins.items()}

    def stored(
        self, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """Return the tensors of the files for parameters by name, of whole groups.

        Args:
            state: the parameters.
            dtypes: of all tensors of the files.
        """
        full = {each.name: state[name] for name, each in self._origins.items() if name in state}
        return {
            file: tensor.to(dtypes[file])
            for group in self.groups
            if group.key in full
            for file, tensor in group.store(self._model, full).items()
        }


@dataclass(frozen=True)
class Matched:
    """A model's parameters and the tensors of its files, held against each other.

    Attributes:
        origins: by full name, of all that the files give.
        unknown: tensors of the files that the model does not know, with the names they would have.
        missing: names of what the model needs and the files lack.
        misfits: tensors of the files with their shape, and the shape that the model needs.
        clashes: phrases about tensors that cannot both be right.
    """

    origins: dict[str, Origin]
    unknown: dict[str, str]
    missing: list[str]
    misfits: dict[str, tuple[list[int], list[int]]]
    clashes: list[str]


def match_tensors(model: PreTrainedModel, reader: CheckpointReader) -> Matched:
    """Find what each parameter is made of, as ``from_pretrained`` does, from headers alone.

    Args:
        model: with parameters on any device, the meta device too.
        reader: of the checkpoint.
    """
    state = {name: each for name, each in model.state_dict().items() if isinstance(each, Tensor)}
    clashes: list[str] = []
    missing: list[str] = []
    groups, unknown = _group(model, reader, state, clashes)
    origins: dict[str, Origin] = {}
    misfits: dict[str, tuple[list[int], list[int]]] = {}
    for group in groups:
        made = _shapes(group, model, reader, state, missing, clashes)
        group.parameters = [group.key, *(name for name in made if name != group.key)]
        for name, shape in made.items():
            if shape != list(state[name].shape):
                misfits[group.files[0]] = shape, list(state[name].shape)
            origins[name] = Origin(group, name)
        if group.conversion is not None and group.trouble is None:
            group.trouble = _trouble(group, model, reader, state)
    _add_shared(model, origins)
    # The class says which buffers it makes by itself; a parameter is never made up.
    patterns = [re.compile(each) for each in model._keys_to_ignore_on_load_missing or ()]
    made_here = {
        name
        for name, _ in model.named_buffers()
        if any(pattern.search(name) for pattern in patterns)
    }
    missing += [name for name in state if name not in origins and name not in made_here]
    return Matched(origins, unknown, missing, misfits, clashes)


@dataclass(frozen=True)
class TensorMap:
    """Where each tensor of the files belongs.

    Attributes:
        blocks: the blocks of the model.
        outside: the base model outside its blocks, by name in the base model.
        head: what is outside the base model, by name in the model.
        rest: names in the files of all that belongs to no block.
        shared: full names of parameters that are others, which the files hold.
    """

    blocks: list[Part]
    outside: Part
    head: Part
    rest: list[str]
    shared: frozenset[str]

    @property
    def trouble(self) -> str | None:
        """Why a changed block could not be stored as it was; None if each can."""
        for group in (group for part in self.blocks for group in part.groups):
            if group.trouble is not None:
                return f"{group.files[0]} belongs to {group.key}, and {group.trouble}"
        owners: dict[str, int] = {}
        for index, part in enumerate(self.blocks):
            for file in part.files:
                if owners.setdefault(file, index) != index:
                    return f"{file} belongs to several blocks"
        return next(
            (
                f"{file} belongs to a block and to what is outside"
                for file in self.outside.files
                if file in owners
            ),
            None,
        )

    @property
    def joined(self) -> str | None:
        """A phrase about a tensor of a block that is no parameter as it is; None without one."""
        for group in (group for part in self.blocks for group in part.groups):
            if group.conversion is not None:
                return f"{group.files[0]} is stored apart from, or together with, other parameters"
        return None


def divide(matched: Matched, blocks: BlockList, reader: CheckpointReader) -> TensorMap:
    """Divide what the files give among the blocks and what is outside them."""
    model, origins = blocks.model, matched.origins
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    inside = f"{blocks.prefix}."
    parts = [
        Part(
            model,
            {
                name: origins[f"{blocks.name(index)}.{name}"]
                for name in block.state_dict()
                if f"{blocks.name(index)}.{name}" in origins
            },
        )
        for index, block in enumerate(blocks)
    ]
    outside = {name: each for name, each in origins.items() if not name.startswith(inside)}
    used = {file for part in parts for file in part.files}
    return TensorMap(
        parts,
        Part(
            model,
            {
                name.removeprefix(base): each
                for name, each in outside.items()
                if name.startswith(base)
            },
        ),
        Part(
            model,
            {
                name: each
                for name, each in outside.items()
                if base and not name.startswith(base) and name == each.name
            },
        ),
        [file for file in reader.files if file not in used],
        frozenset(name for name, each in origins.items() if name != each.name),
    )


def _group(
    model: PreTrainedModel,
    reader: CheckpointReader,
    state: dict[str, Tensor],
    clashes: list[str],
) -> tuple[list[Group], dict[str, str]]:
    """Groups in the order of loading, and the names that unknown tensors would have."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    conversions = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in conversions for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    unknown: dict[str, str] = {}
    # The order in which transformers joins them.
    for file in sorted(reader.shapes, key=dot_natural_key):
        key, pattern = rename_source_key(file, renamings, conversions, prefix, state)
        if key not in state and file in state:
            key, pattern = rename_source_key(file, [], [], prefix, state)
        if key not in state:
            unknown[file] = key
            continue
        group = groups.setdefault(key, Group(key))
        if group.files and (pattern is None or group.conversion is None):
            clashes.append(f"{group.files[0]} and {file} are both to be {key}")
            continue
        group.files.append(file)
        if pattern is None:
            continue
        group.conversion = group.conversion or by_pattern[pattern]
        group.patterns.append(pattern)
        known = apply_renamings(file, renamings)
        converted, _ = apply_converters(known, conversions)
        if key == f"{prefix}.{converted}":
            known = f"{prefix}.{known}"
        elif converted == f"{prefix}.{key}":
            known = known.removeprefix(f"{prefix}.")
        group.known_as.append(known)
    return list(groups.values()), unknown


def _shapes(
    group: Group,
    model: PreTrainedModel,
    reader: CheckpointReader,
    state: Mapping[str, Tensor],
    missing: list[str],
    clashes: list[str],
) -> dict[str, list[int]]:
    """Shapes of what a group makes by full name; what it lacks is added to the missing."""
    shape = list(state[group.key].shape)
    if group.conversion is not None and len(group.conversion.target_patterns) == 1:
        # What one parameter is joined of, the way back says.
        group.parameters = [group.key]
        try:
            wanted = group.split(model, {group.key: torch.empty(shape, device="meta")})
        except Exception as error:
            group.trouble = str(error)
        else:
            found = set(group.known_as)
            lacking = [name for name in wanted if name not in found]
            missing += [_in_files(name, group) for name in lacking]
            if extra := found - set(wanted):
                clashes.append(f"config.json has no place for {min(extra)}")
            if lacking or extra:
                return {group.key: shape}
    tensors = {
        file: torch.empty(reader.shapes[file], dtype=reader.dtypes[file], device="meta")
        for file in group.files
    }
    try:
        return {name: list(each.shape) for name, each in group.load(model, tensors).items()}
    except Exception:
        # Shapes that do not go together.
        return {group.key: list(reader.shapes[group.files[0]])}


def _in_files(name: str, group: Group) -> str:
    """What the files would call a tensor of a group that they lack."""
    file, known = group.files[0], group.known_as[0]
    while file and known and file[-1] == known[-1]:
        file, known = file[:-1], known[:-1]
    return file + name.removeprefix(known) if name.startswith(known) else name


def _trouble(
    group: Group, model: PreTrainedModel, reader: CheckpointReader, state: Mapping[str, Tensor]
) -> str | None:
    """Why parameters would not be stored under the names and in the shapes of the files."""
    if any(name not in state for name in group.parameters):
        return "it would give parameters that the model does not have"
    empty = {name: torch.empty_like(state[name], device="meta") for name in group.parameters}
    try:
        made = group.split(model, empty)
    except Exception as error:
        return f"transformers has no way back for it ({str(error) or type(error).__name__})"
    shapes = {
        known: list(reader.shapes[file])
        for file, known in zip(group.files, group.known_as, strict=True)
    }
    if {name: list(tensor.shape) for name, tensor in made.items()} != shapes:
        return "the way back would give other names or shapes"
    return None


def _add_shared(model: PreTrainedModel, origins: dict[str, Origin]) -> None:
    """Let parameters that are one have one origin, where the files hold it once."""
    families: dict[str, set[str]] = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        families.setdefault(source, {source}).add(target)
    # Code of a checkpoint's own may use a module in two places.
    shared: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), set()).add(name)
    for family in [*families.values(), *(each for each in shared.values() if len(each) > 1)]:
        found = next((origins[name] for name in sorted(family) if name in origins), None)
        if found is not None:
            for name in family:
                origins.setdefault(name, found)


def _converted(transform: WeightConverter, key: str, model: PreTrainedModel) -> dict[str, Tensor]:
    made = transform.convert(key, model=model, config=model.config)
    return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}
