"""Option files that cannot be read, and options that are not valid."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import pytest
from pydantic import Field, model_validator

import secateur
from secateur.pruning.recipe import Recipe
from secateur.runs.errors import SecateurError
from secateur.runs.options import Options, put_over, read_mapping


class Saw(Options):
    method: Literal["saw"] = "saw"
    teeth: int = Field(24, ge=1)


class Shears(Options):
    method: Literal["shears"] = "shears"
    blade: float = 1.0


class Handle(Options):
    length: int = 10


class Tools(Options):
    noun: ClassVar[str] = "tool box"

    tools: tuple[Annotated[Saw | Shears, Field(discriminator="method")], ...] = ()
    handle: Handle | None = None
    count: int = 1

    @model_validator(mode="after")
    def _has_room(self) -> Tools:
        if self.count > 9:
            raise ValueError(f"{self.count} tools do not fit, leave some out.")
        return self


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not valid YAML: .* in line"),
        (b"a: b: c", "is not valid YAML: mapping values are not allowed here in line 1"),
        (b"a: \x01", "is not valid YAML: unacceptable character"),
        (b"- a list", "a YAML mapping was expected"),
        (b"", "a YAML mapping was expected"),
        ("count: 1\n".encode("utf-16"), "not UTF-8 text"),
        ("# é\ncount: 1\n".encode("latin-1"), "not UTF-8 text"),
        (b"count: " + b"9" * 5000, "is not valid YAML: Exceeds the limit"),
        (b"day: 2026-13-45", "is not valid YAML: month must be in"),
        (b"[" * 100_000, "nested too deeply"),
        (b"? [a]\n: b", "is not valid YAML: found unhashable key in line 1"),
        (b"&a [*a]", "nested too deeply"),
        (b"a: 1\na: 2", "'a' is there twice in the mapping from line 1 on"),
        (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (
            b"\n".join(
                b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9 if i else [b"x"]))
                for i in range(9)
            ),
            "stands for too many values",
        ),
        (b"# " + b"x" * (1 << 23), "is larger than 4 MB"),
    ],
)
def test_an_unreadable_file_is_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_bytes(content)
    with pytest.raises(SecateurError, match=message) as caught:
        Tools.from_file(path)
    assert f"The tool box {path}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in [
        ("gone", "no such file"),
        (".", "is a directory"),
        ("file/below", "not a directory"),
        ("n" * 300, "file name too long"),
    ]:
        with pytest.raises(SecateurError, match=f"cannot be read \\({reason}"):
            read_mapping(tmp_path / name, "tool box")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tool": []}, "In the tool box there is the unknown key tool; did you mean tools?"),
        ({"x": 1}, "the unknown key x; known keys are tools, handle, count."),
        ({"handle": {"lenght": 2}}, "unknown key handle.lenght; did you mean length?"),
        ({"tools": [{"method": "saw", "tooth": 2}]}, "key tools.0.saw.tooth; did you mean teeth?"),
        ({"tools": [{"method": "shear"}]}, "tools.0 names no known method 'shear'; did you mean"),
        ({"tools": [{"teeth": 2}]}, "tools.0 lacks the key method; each method is one of saw, sh"),
        ({"tools": [{"method": "saw", "teeth": 0}]}, "tools.0.saw.teeth is not valid: Input shou"),
        ({"count": "many"}, "In the tool box, count is not valid: "),
        ({"count": 10}, "The tool box cannot be used: 10 tools do not fit, leave some out."),
        ({1: 2}, "In the tool box, 1 is not valid: "),
    ],
)
def test_what_is_wrong_is_one_sentence(values: dict[str, object], message: str) -> None:
    with pytest.raises(SecateurError) as caught:
        Tools.from_mapping(values)
    assert message in str(caught.value)
    assert str(caught.value)[-1] in ".?"
    assert "\n" not in str(caught.value)


def test_options_survive_a_file(tmp_path: Path) -> None:
    made = Tools.from_mapping({"tools": [{"method": "shears"}], "handle": {"length": 3}})
    (tmp_path / "box.yaml").write_text(made.to_yaml(), encoding="utf-8")
    assert Tools.from_file(tmp_path / "box.yaml") == made


def test_nested_values_are_put_over_one_by_one() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
    assert put_over(base, {"a": {"c": 4}, "d": 5, "f": {}}) == {
        "a": {"b": 1, "c": 4},
        "d": 5,
        "f": {},
    }
    assert base == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}


def option_models() -> list[type[Options]]:
    for module in pkgutil.walk_packages(secateur.__path__, "secateur."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = [Options]
    for model in found:
        found += [each for each in model.__subclasses__() if each not in found]
    return [each for each in found if each.__module__.startswith("secateur.")]


def numbers_without_limits(annotation: Any, metadata: Iterable[Any]) -> bool:
    """Whether a number may be of any size at all."""
    limits = {name for each in metadata for name in ("ge", "gt", "le", "lt") if hasattr(each, name)}
    if limits & {"ge", "gt"} and limits & {"le", "lt"}:
        return False
    if get_origin(annotation) is Literal:
        return False
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        more = [each for part in more for each in getattr(part, "metadata", [part])]
        return numbers_without_limits(inner, more)
    parts = get_args(annotation)
    return annotation in (int, float) or any(numbers_without_limits(part, ()) for part in parts)


# What bounds a number that its field does not.
BOUNDED_OTHERWISE = {
    ("BenchOptions", "batch"): "a validator bounds each size",
    ("CalibrationOptions", "source"): "a validator bounds the weights of a mix",
    ("RowOptions", "script"): "words of a command, which become text",
}


def test_every_number_has_limits() -> None:
    models = option_models()
    assert len(models) > 25
    unbounded = {
        (model.__name__, name)
        for model in models
        for name, field in model.model_fields.items()
        if numbers_without_limits(field.annotation, field.metadata)
    }
    assert unbounded == BOUNDED_OTHERWISE.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"held_out": 10**400}, "held_out is not valid: Input should be less than or equal to"),
        ({"held_out": True}, "held_out is a number, not true"),
        ({"activation_memory": float("nan")}, "activation_memory is not valid: .*finite number"),
        ({"activation_memory": 10**400}, "activation_memory is not valid"),
        ({"calibration": {"seed": 2**64}}, r"calibration\.seed is not valid"),
        ({"calibration": {"samples": 10**12}}, "are too many; use at most"),
        ({"calibration": {"source": {"a": 1e308}}}, "give a positive number up to"),
        ({"stages": [{"method": "wanda"}] * 1000}, "at most 32 items"),
        ({"device": "x" * 10**6}, "at most 16384 characters"),
        ({"x" * 10**6: 1}, "unknown key x{120}…"),
        ({1: 1}, "Keys should be strings"),
        ({"pattern": "1:" + "9" * 30}, "groups of 9{30} columns"),
        ({"pattern": "9" * 10**5}, r"is not in \[0, 1\)"),
        ({"pattern": "x" * 10**5}, "pattern 'x{40}…' is not understood"),
    ],
)
def test_no_number_and_no_text_is_without_bound(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message) as raised:
        Recipe.from_mapping(values)
    assert len(str(raised.value)) < 800
