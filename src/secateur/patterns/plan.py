"""The pruning plan: how many zeros every linear gets, in memory and as a file to edit."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.patterns.pattern import (
    NM,
    Pattern,
    Unstructured,
    check_width,
    parse_pattern,
    proportional_counts,
)
from secateur.runs.errors import SecateurError
from secateur.runs.files import write_text

_HEADER = ("pattern", "weights", "zeros", "linears")


@dataclass(frozen=True)
class PlanFile:
    """Where a plan was read from, so that what is wrong with it can be pointed at.

    Attributes:
        path: the file.
        weights: weights of all linears, as its header says.
        zeros: zeros of all linears, as its header says.
        lines: line number of each header key and each linear.
    """

    path: Path
    weights: int
    zeros: int
    lines: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """Exact zeros per linear.

    Attributes:
        pattern: what masks must look like.
        weights: number of weights of each linear, by full name in block order.
        zeros: number of zeros of each linear.
        file: the file it was read from, None if it was computed.
    """

    pattern: Pattern
    weights: Mapping[str, int]
    zeros: Mapping[str, int]
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
        """Write the plan as JSON, one line per linear."""
        write_text(path, self.to_json())

    @classmethod
    def from_file(cls, path: Path) -> Plan:
        """Read a plan; ``check_fits`` holds its counts against each other and a model.

        Raises:
            SecateurError: the file cannot be read, or its form is not that of a plan.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise SecateurError(
                f"{path}, line {error.lineno}: this is not valid JSON ({error.msg}); mend the line."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise SecateurError(f"The plan {path} cannot be read; check the path.") from error
        return _read(path, text, values)

    def check_fits(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Hold the plan against a model and its own totals.

        Args:
            shapes: (out, in) of the model's linears by full name.

        Raises:
            SecateurError: a linear is unknown, missing or of another size, a count does not fit
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
        """Name the place of a linear or a header key."""
        return "The plan" if self.file is None else f"{self.file.path}, line {self.file.lines[key]}"


def uniform_plan(shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> Plan:
    """Give every linear the same sparsity; all zeros together are exactly round(s · weights).

    Args:
        shapes: (out, in) of the model's linears by full name.
        pattern: what masks must look like.

    Raises:
        SecateurError: a linear's width does not fit an n:m pattern.
    """
    weights: dict[str, int] = {}
    for name, (rows, columns) in shapes.items():
        try:
            check_width(pattern, columns)
        except SecateurError as error:
            raise SecateurError(f"{name}: {error}") from error
        weights[name] = rows * columns
    sizes = list(weights.values())
    match pattern:
        case Unstructured(sparsity=sparsity):
            zeros = proportional_counts(round(sparsity * sum(sizes)), sizes)
        case NM(n=n, m=m):
            zeros = [size // m * (m - n) for size in sizes]
    return Plan(pattern, weights, dict(zip(weights, zeros, strict=True)))


def _read(path: Path, text: str, values: Any) -> Plan:
    form = '{"pattern": …, "weights": …, "zeros": …, "linears": {…}}'
    if not isinstance(values, dict):
        raise SecateurError(f"{path} is no plan; {form} was expected.")
    lines: dict[str, int] = {}
    linears_at = 0
    for key, line, at in _members(text, _skip_space(text, 0)):
        if key not in _HEADER:
            near = difflib.get_close_matches(key, _HEADER, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a plan is {form}."
            raise SecateurError(f"{path}, line {line}: unknown key {key}; {hint}")
        lines[key] = line
        linears_at = at if key == "linears" else linears_at
    for key in _HEADER:
        if key not in lines:
            raise SecateurError(f'{path} lacks the key "{key}"; a plan is {form}.')
    if not isinstance(values["linears"], dict):
        raise SecateurError(
            f'{path}, line {lines["linears"]}: "linears" must be an object with one entry per '
            "linear."
        )
    for key in ("weights", "zeros"):
        if type(values[key]) is not int:
            raise SecateurError(f'{path}, line {lines[key]}: "{key}" must be a whole number.')
    try:
        pattern = parse_pattern(str(values["pattern"]))
    except SecateurError as error:
        raise SecateurError(f"{path}, line {lines['pattern']}: {error}") from error

    weights: dict[str, int] = {}
    zeros: dict[str, int] = {}
    for name, line, _ in _members(text, linears_at):
        entry = values["linears"][name]
        if name in weights:
            raise SecateurError(
                f"{path}, line {line}: {name} is there a second time; remove one of the lines."
            )
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"weights", "zeros"}
            or any(type(count) is not int for count in entry.values())
        ):
            raise SecateurError(
                f'{path}, line {line}: {name} needs two whole numbers, {{"weights": …, '
                '"zeros": …}.'
            )
        lines[name] = line
        weights[name], zeros[name] = entry["weights"], entry["zeros"]
    return Plan(pattern, weights, zeros, PlanFile(path, values["weights"], values["zeros"], lines))


def _members(text: str, at: int) -> Iterator[tuple[str, int, int]]:
    """Keys of the valid JSON object at a position: key, line number, position of its value."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _skip_space(text, at + 1)
    while text[at] != "}":
        line, counted = line + text.count("\n", counted, at), at
        key, at = decoder.raw_decode(text, at)
        at = _skip_space(text, _skip_space(text, at) + 1)
        yield key, line, at
        _, at = decoder.raw_decode(text, at)
        at = _skip_space(text, at)
        if text[at] == ",":
            at = _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at
