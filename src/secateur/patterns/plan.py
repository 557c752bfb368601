"""The pruning plan: how many zeros every linear gets, in memory and as a file to edit."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from secateur.patterns.pattern import (
    NM,
    Pattern,
    Unstructured,
    check_width,
    parse_pattern,
    uniform_zeros,
)
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_text
from secateur.runs.reading import read_text_file

_HEADER = ("pattern", "weights", "zeros", "linears")
_FORM = '{"pattern": …, "weights": …, "zeros": …, "linears": {…}}'
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class PlanFile:
    """Where a plan was read from, so that its faults can be pointed at.

    Attributes:
        path: The file.
        text: Its content.
        weights: Weights of all linears, as its header says.
        zeros: Zeros of all linears, as its header says.
    """

    path: Path
    text: str
    weights: int = 0
    zeros: int = 0

    def at(self, key: str) -> str:
        """Name the place of a linear or a header key."""
        line = self._lines().get(key)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    def _lines(self) -> dict[str, int]:
        # JSON is YAML, whose parser keeps the places. It refuses tabs and broken surrogates.
        try:
            root: Any = yaml.compose(self.text.replace("\t", " "), Loader=_Loader)
        except yaml.YAMLError:
            return {}
        members = list(root.value)
        for key, value in root.value:
            if key.value == "linears" and isinstance(value, yaml.MappingNode):
                members += value.value
        return {key.value: key.start_mark.line + 1 for key, _ in members}


@dataclass(frozen=True)
class Plan:
    """Exact zeros per linear.

    Attributes:
        pattern: What masks must look like.
        weights: Number of weights of each linear, by full name in block order.
        zeros: Number of zeros of each linear.
        left: How many linears of the model are left as they are, if that is known.
        left_weights: Weights of these.
        file: The file it was read from, None if it was computed.
    """

    pattern: Pattern
    weights: Mapping[str, int]
    zeros: Mapping[str, int]
    left: int = field(default=0, compare=False)
    left_weights: int = field(default=0, compare=False)
    file: PlanFile | None = field(default=None, compare=False, repr=False)

    @property
    def sparsity(self) -> float:
        """Zeros over weights, all linears together."""
        return sum(self.zeros.values()) / sum(self.weights.values())

    def to_json(self) -> str:
        """The plan as JSON, one line per linear."""
        linears = ",\n".join(
            f'    {json.dumps(name)}: {{"weights": {weights}, "zeros": {self.zeros[name]}}}'
            for name, weights in self.weights.items()
        )
        return (
            "{\n"
            f'  "pattern": {json.dumps(str(self.pattern))},\n'
            f'  "weights": {sum(self.weights.values())},\n'
            f'  "zeros": {sum(self.zeros.values())},\n'
            f'  "linears": {{\n{linears}\n  }}\n'
            "}\n"
        )

    def write(self, path: Path) -> None:
        """Write ``to_json`` to a file."""
        write_text(path, self.to_json())

    @classmethod
    def from_file(cls, path: Path) -> Plan:
        """Read a plan, and leave it to ``check_fits`` to compare its counts.

        Raises:
            SecateurError: The file cannot be read, or its form is not that of a plan.
        """
        return _read(PlanFile(path, read_text_file(path, "The plan")))

    def check_fits(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Hold the plan against a model and its own totals.

        Args:
            shapes: (out, in) of the model's linears by full name.

        Raises:
            SecateurError: A linear is unknown, missing or of another size, a count does not fit
                its linear or the pattern, or a total of the file is not the sum.
        """
        uniform = uniform_plan(shapes, self.pattern)
        for name in self.weights:
            if name not in uniform.weights:
                near = difflib.get_close_matches(name, uniform.weights, n=1)
                hint = f"did you mean {near[0]}?" if near else "remove the line."
                raise SecateurError(f"{self._at(name)}: the model has no linear {name}; {hint}")
        for name, weights in uniform.weights.items():
            if name not in self.weights:
                raise SecateurError(
                    f'{self._at("linears")}: the linear {name} is missing; add "{name}": '
                    f'{{"weights": {weights}, "zeros": {uniform.zeros[name]}}}.'
                )
            if self.weights[name] != weights:
                raise SecateurError(
                    f"{self._at(name)}: {name} has {weights} weights in the model, not "
                    f"{self.weights[name]}; write the plan anew for this model."
                )
            zeros = self.zeros[name]
            if not 0 <= zeros <= weights:
                raise SecateurError(
                    f"{self._at(name)}: {zeros} zeros do not fit in the {weights} weights of "
                    f"{name}; give a number from 0 to {weights}."
                )
            if isinstance(self.pattern, NM) and zeros != uniform.zeros[name]:
                raise SecateurError(
                    f"{self._at(name)}: pattern {self.pattern} puts exactly {uniform.zeros[name]} "
                    f"zeros in {name}, not {zeros}; write that number, or choose a sparsity as "
                    "the pattern."
                )
        self._check_totals()

    def _check_totals(self) -> None:
        weights, zeros = sum(self.weights.values()), sum(self.zeros.values())
        if self.file is not None:
            for key, said, found in (
                ("weights", self.file.weights, weights),
                ("zeros", self.file.zeros, zeros),
            ):
                if said != found:
                    raise SecateurError(
                        f'{self._at(key)}: "{key}" says {said}, but the linears have {found} '
                        f"together; write {found}, or change the linears until they fit."
                    )
        if isinstance(self.pattern, Unstructured) and zeros != round(
            self.pattern.sparsity * weights
        ):
            raise SecateurError(
                f"{self._at('pattern')}: a sparsity of {self.pattern} means "
                f"{round(self.pattern.sparsity * weights)} zeros, but the plan has {zeros}; write "
                f'"{Unstructured(zeros / weights)}" as the pattern, or change the linears.'
            )

    def _at(self, key: str) -> str:
        return "The plan" if self.file is None else self.file.at(key)


def uniform_plan(shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> Plan:
    """Give every linear the same sparsity; all zeros together are exactly round(s · weights).

    Args:
        shapes: (out, in) of the model's linears by full name.
        pattern: What masks must look like.

    Raises:
        SecateurError: A linear's width does not fit an n:m pattern.
    """
    weights: dict[str, int] = {}
    for name, (rows, columns) in shapes.items():
        try:
            check_width(pattern, columns)
        except SecateurError as error:
            raise SecateurError(f"{name}: {error}") from error
        weights[name] = rows * columns
    zeros = uniform_zeros(pattern, list(weights.values()))
    return Plan(pattern, weights, dict(zip(weights, zeros, strict=True)))


def _read(file: PlanFile) -> Plan:
    values = _load(file)
    if not isinstance(values, dict):
        raise SecateurError(f"{file.path} is no plan; {_FORM} was expected.")
    for key in values:
        if key not in _HEADER:
            near = difflib.get_close_matches(key, _HEADER, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a plan is {_FORM}."
            raise SecateurError(f"{file.at(key)}: unknown key {key}; {hint}")
    for key in _HEADER:
        if key not in values:
            raise SecateurError(f'{file.path} lacks the key "{key}"; a plan is {_FORM}.')
    linears = values["linears"]
    if not isinstance(linears, dict):
        raise SecateurError(
            f'{file.at("linears")}: "linears" must be an object with one entry per linear.'
        )
    for key in ("weights", "zeros"):
        if type(values[key]) is not int:
            raise SecateurError(f'{file.at(key)}: "{key}" must be a whole number.')
    try:
        pattern = parse_pattern(str(values["pattern"]))
    except SecateurError as error:
        raise SecateurError(f"{file.at('pattern')}: {error}") from error
    for name, entry in linears.items():
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"weights", "zeros"}
            or any(type(count) is not int for count in entry.values())
        ):
            raise SecateurError(
                f'{file.at(name)}: {name} needs two whole numbers, {{"weights": …, "zeros": …}}.'
            )
    return Plan(
        pattern,
        {name: entry["weights"] for name, entry in linears.items()},
        {name: entry["zeros"] for name, entry in linears.items()},
        file=replace(file, weights=values["weights"], zeros=values["zeros"]),
    )


def _load(file: PlanFile) -> Any:
    repeated: list[str] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        repeated.extend(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        values = json.loads(file.text, object_pairs_hook=members)
    except json.JSONDecodeError as error:
        raise SecateurError(
            f"{file.path}, line {error.lineno}: this is not valid JSON ({error.msg}); mend the "
            "line."
        ) from error
    except (RecursionError, ValueError) as error:
        # Thousands of brackets inside each other, or thousands of digits.
        raise SecateurError(f"{file.path} is no plan; {_FORM} was expected.") from error
    if repeated:
        name = repeated[0]
        raise SecateurError(
            f"{file.at(name)}: {name} is there a second time; remove one of the lines."
        )
    return values
