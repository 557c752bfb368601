"""Options as models: read from files, put over presets, and explained when they are wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from inspect import isclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from secateur.runs.errors import SecateurError, explained, shortened
from secateur.runs.reading import parse_yaml, read_text_file

# A file of options is kilobytes, and so is a prompt or a path.
_LARGEST_BYTES = 1 << 22
_LONGEST_TEXT = 1 << 14
# What a sentence repeats of what the user wrote.
_SHOWN = 120


LinearPatterns = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
"""Patterns of full names of linears; one alone needs no list."""


class Options(BaseModel):
    """Options of one thing, whether a file, flags or Python give them."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        str_max_length=_LONGEST_TEXT,
    )

    noun: ClassVar[str] = "options"
    """What sentences call them."""

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        # To pydantic, true is 1.
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and (field := cls.model_fields.get(str(name))):
                types = set(_plain_types(field.annotation))
                if types & {int, float} and bool not in types:
                    raise ValueError(f"{name} is a number, not {str(value).lower()}")
        return values

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Self:
        """Validate plain values.

        Raises:
            SecateurError: an unknown key (the nearest known one is named) or a bad value.
        """
        with explained(f"The {cls.noun} cannot be used", "check their values."):
            try:
                return cls.model_validate(values)
            except ValidationError as error:
                raise SecateurError(_explain(cls, error)) from error

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Validate plain values that are given by name, as ``from_mapping`` does."""
        return cls.from_mapping(values)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a YAML file.

        Raises:
            SecateurError: the file cannot be read, or what it holds is not valid.
        """
        return cls.from_mapping(read_mapping(path, cls.noun))

    def to_yaml(self) -> str:
        """YAML with every option written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_mapping(path: Path, noun: str) -> dict[str, Any]:
    """Read plain values from a YAML file.

    Raises:
        SecateurError: the file cannot be read, or holds no YAML mapping.
    """
    text = read_text_file(path, f"The {noun}", largest=_LARGEST_BYTES)
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise SecateurError(
            f"The {noun} {path} is not valid YAML: {error}; mend the file."
        ) from error
    if not isinstance(values, dict):
        raise SecateurError(
            f"The {noun} {path} is not valid: a YAML mapping was expected, lines such as "
            "'key: value'."
        )
    return values


def put_over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``values``, nested ones too, in place of its own."""
    merged = dict(base)
    for key, value in values.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = put_over(inner, value)
        merged[key] = value
    return merged


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to say behind an unknown name: the known one that is meant, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {', '.join(names)}."


def _explain(model: type[Options], error: ValidationError) -> str:
    """Say the first problem in one sentence."""
    first, *others = error.errors()
    # Of the types that a value may have, the one that fits further is meant.
    same = [each for each in others if each["loc"][:1] == first["loc"][:1]]
    problem = max([first, *same], key=lambda each: len(each["loc"]))
    place = [part for part in problem["loc"] if not _is_type(part)]
    where = shortened(".".join(map(str, place)), _SHOWN)
    match problem["type"]:
        case "extra_forbidden":
            known = [name for each in _models_at(model, place[:-1]) for name in each.model_fields]
            hint = nearest(str(place[-1]), known, "known keys are")
            return f"In the {model.noun} there is the unknown key {where}; {hint}"
        case "union_tag_invalid" | "union_tag_not_found":
            key = problem["ctx"]["discriminator"].strip("'")
            tag = shortened(str(problem["ctx"].get("tag", "")), _SHOWN)
            hint = nearest(tag, map(_tag, _models_at(model, place)), f"each {key} is one of")
            said = f"names no known {key} {tag!r}" if tag else f"lacks the key {key}"
            return f"In the {model.noun}, {where} {said}; {hint}"
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    message = shortened(message, 4 * _SHOWN)
    if not place:
        return f"The {model.noun} cannot be used: {message}."
    return f"In the {model.noun}, {where} is not valid: {message}."


def _is_type(part: int | str) -> bool:
    """Whether pydantic names a type by a part of a place."""
    return isinstance(part, str) and ("[" in part or part.startswith("constrained-"))


def _models_at(model: type[BaseModel], place: Iterable[int | str]) -> list[type[BaseModel]]:
    """The models that may stand at a place of another, as pydantic names it."""
    found = [model]
    for part in place:
        if tagged := [each for each in found if _tag(each) == part]:
            found = tagged
        elif isinstance(part, str):
            fields = [each.model_fields[part] for each in found if part in each.model_fields]
            found = [inner for field in fields for inner in _models_in(field.annotation)]
    return found


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows a value itself to have."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        for part in get_args(annotation):
            yield from _plain_types(part)
    else:
        yield annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _tag(model: type[BaseModel]) -> str:
    """The name by which a union tells the model apart, empty if it has none."""
    method = model.model_fields.get("method")
    return str(method.default) if method else ""
