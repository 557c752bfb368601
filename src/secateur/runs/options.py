"""Options as models: read from files, put over presets, and explained when they are wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from inspect import isclass
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.runs.errors import SecateurError


class Options(BaseModel):
    """Options of one thing, whether a file, flags or Python give them."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    noun: ClassVar[str] = "options"
    """What sentences call them."""

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Self:
        """Validate plain values.

        Raises:
            SecateurError: an unknown key (the nearest known one is named) or a bad value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SecateurError(_explain(cls, error)) from error

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
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SecateurError(
            f"The {noun} {path} cannot be read ({reason}); check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"The {noun} {path} is not valid: it is not UTF-8 text; save it as UTF-8."
        ) from error
    except RecursionError as error:
        raise SecateurError(
            f"The {noun} {path} is not valid YAML: it is nested too deeply; write it flat."
        ) from error
    # Numbers of thousands of digits and dates that do not exist are a ValueError.
    except (yaml.YAMLError, ValueError) as error:
        raise SecateurError(
            f"The {noun} {path} is not valid YAML: {_yaml_problem(error)}; mend the file."
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


def _yaml_problem(error: Exception) -> str:
    """The first thing that is wrong, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return str(error).splitlines()[0].rstrip(".")


def _explain(model: type[Options], error: ValidationError) -> str:
    """Say the first problem in one sentence."""
    problem = error.errors()[0]
    place = problem["loc"]
    where = ".".join(map(str, place))
    match problem["type"]:
        case "extra_forbidden":
            known = [name for each in _models_at(model, place[:-1]) for name in each.model_fields]
            hint = nearest(str(place[-1]), known, "known keys are")
            return f"In the {model.noun} there is the unknown key {where}; {hint}"
        case "union_tag_invalid" | "union_tag_not_found":
            key = problem["ctx"]["discriminator"].strip("'")
            tag = str(problem["ctx"].get("tag", ""))
            hint = nearest(tag, map(_tag, _models_at(model, place)), f"each {key} is one of")
            said = f"names no known {key} {tag!r}" if tag else f"lacks the key {key}"
            return f"In the {model.noun}, {where} {said}; {hint}"
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if not place:
        return f"The {model.noun} cannot be used: {message}."
    return f"In the {model.noun}, {where} is not valid: {message}."


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


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _tag(model: type[BaseModel]) -> str:
    """The name by which a union tells the model apart, empty if it has none."""
    method = model.model_fields.get("method")
    return str(method.default) if method else ""
