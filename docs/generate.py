"""Write what the option models say of themselves: for the command line, and as reference pages.

``python docs/generate.py`` writes src/secateur/cli/options.json and the marked parts of the pages
in docs/reference. What stands outside of the marks is written by hand.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from typer.models import OptionInfo

from secateur.allocation import ALLOCATIONS
from secateur.comparison.options import Comparison
from secateur.deploy.bench.options import BenchOptions
from secateur.deploy.export import ExportOptions
from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.tasks import TASKS
from secateur.methods import STAGES
from secateur.models.formats import FORMATS
from secateur.models.formats.format import find_format
from secateur.pruning.recipe import Recipe
from secateur.runs.options import Options
from secateur.shrinking.options import ShrinkOptions
from secateur.text.sources import SOURCES
from secateur.training.options import PRESETS, Training
from secateur.training.recovery_options import Recovery

ROOT = Path(__file__).parents[1]
DESCRIBED = ROOT / "src" / "secateur" / "cli" / "options.json"
REFERENCE = ROOT / "docs" / "reference"
PAGES = [REFERENCE / f"{name}.md" for name in ("cli", "recipe", "options")]

_MARKED = re.compile(r"(<!-- from the models: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Tables that leave what is nested to another one.
_FLAT = ("recipe",)
_Described = dict[str, dict[str, Any]]


def described() -> str:
    """The content of the file that the command line reads."""
    papers = {"": ShrinkOptions(), "paper": ShrinkOptions.from_mapping({"preset": "paper"})}
    presets = {name: Training.from_mapping({"tokens": 10**9}, name) for name in PRESETS}
    options = {
        **_options("recipe", Recipe, {"": Recipe()}),
        **_options("shrink", ShrinkOptions, papers),
        **_options("training", Training, presets),
        **_options("recovery", Recovery, {"": Recovery()}),
        **_options("evaluation", EvaluationOptions),
        **_options("bench", BenchOptions),
        **_options("export", ExportOptions, {"": ExportOptions()}),
        **_options("comparison", Comparison),
    }
    for kind, models in (("stages", STAGES), ("allocations", ALLOCATIONS)):
        for name, model in models.items():
            options[f"{kind}.{name}"] = {"kind": kind, "default": "", "help": _says(model)}
            options |= _options(f"{kind}.{name}", model)
    parts = {
        "options": options,
        # A format that has two names is told once.
        "formats": {
            name: _says(find_format(name))
            for name in {path: name for name, path in reversed(FORMATS.items())}.values()
        },
        "calibrations": SOURCES,
        "tasks": {name: task.description for name, task in TASKS.items()},
    }
    # A line for each, so that a change shows as one.
    lines = {
        part: ",\n".join(f"  {json.dumps(key)}: {_json(value)}" for key, value in content.items())
        for part, content in parts.items()
    }
    whole = ",\n".join(f'"{part}": {{\n{content}\n}}' for part, content in lines.items())
    return f"{{\n{whole}\n}}\n"


def page(text: str) -> str:
    """A reference page with its marked parts written anew."""
    # It reads the file that may just have been written.
    from secateur.cli.flags import OPTIONS

    def write(part: re.Match[str]) -> str:
        match part[2]:
            case "command":
                content = _flags(part[3])
            case "options":
                content = _table(OPTIONS, part[3], deep=part[3] not in _FLAT)
            case "each":
                content = "\n\n".join(_sections(OPTIONS, part[3]))
            case "example":
                content = f"```yaml\n{Recipe().to_yaml()}```"
        return f"{part[1]}\n{content}\n\n{part[4]}"

    return _MARKED.sub(write, text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _options(
    prefix: str, model: type[Options], made: Mapping[str, Any] | None = None
) -> _Described:
    """Describe the options of a model by dotted name.

    Args:
        prefix: what their names begin with.
        model: the model.
        made: the model as each preset makes it, the default first; its own defaults if None.
    """
    found: _Described = {}
    for name, field in model.model_fields.items():
        if name == "method":
            continue
        full = f"{prefix}.{field.alias or name}"
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        values = {key: getattr(each, name) for key, each in (made or {}).items()} or {"": default}
        inner = [each for each in _types(field.annotation) if _is_options(each)]
        if len(inner) == 1:
            optional = NoneType in _types(field.annotation)
            shown = json.dumps(next(iter(values.values())) is not None) if optional else ""
            found[full] = {
                "kind": "part",
                "default": shown,
                "help": field.description or _says(inner[0]),
            }
            parts = {key: value or inner[0]() for key, value in values.items()}
            found |= _options(full, inner[0], parts)
            continue
        assert field.description, f"{full} has no description"
        found[full] = {
            **_kind(field.annotation),
            "default": "" if field.is_required() else _by_preset(name, values),
            "help": field.description,
        }
    return found


def _kind(annotation: Any) -> dict[str, Any]:
    types = [each for each in _types(annotation) if each is not NoneType]
    if types and not any(inspect.isclass(each) for each in types):
        return {"kind": "choice", "choices": types}
    if get_origin(annotation) is tuple and types == [int]:
        # Typed in one word.
        return {"kind": "text"}
    for kind, known in (("switch", bool), ("whole number", int), ("number", float)):
        if types == [known]:
            return {"kind": kind}
    if get_origin(annotation) is tuple and types == [str]:
        return {"kind": "names"}
    return {"kind": "text"}


def _types(annotation: Any) -> list[Any]:
    """The classes in an annotation, and the values of literals."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    inner = [found for part in get_args(annotation) for found in _types(part)]
    return inner or [annotation] if inspect.isclass(annotation) or inner else []


def _is_options(each: Any) -> bool:
    return inspect.isclass(each) and issubclass(each, Options)


def _by_preset(name: str, values: Mapping[str, Any]) -> str:
    """The default, and behind it those of presets that have another."""
    first, *_ = shown = {preset: _shown(value) for preset, value in values.items()}
    others = [f"{key}: {text}" for key, text in shown.items() if text != shown[first]]
    return "; ".join([shown[first], *others] if name != "preset" else [shown[first]])


def _shown(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return json.dumps(value)
        case float():
            return f"{value:g}"
        case tuple():
            return ", ".join(map(_shown, value))
        case Options():
            return str(getattr(value, "method", ""))
    return str(value)


def _says(model: type) -> str:
    return (model.__doc__ or "").splitlines()[0].rstrip(".")


def _flags(command: str) -> str:
    """The options of a command; those that plan and estimate have of prune are said there."""
    from secateur import cli
    from secateur.cli.recipe import recipe_from_flags

    shared = inspect.signature(recipe_from_flags).parameters if command != "prune" else ()
    rows = []
    for name, parameter in inspect.signature(cli.COMMANDS[command]).parameters.items():
        flag = next((each for each in get_args(parameter.annotation) if _is_flag(each)), None)
        if flag is None or (name in shared and command in ("plan", "estimate")):
            continue
        typed = [each for each in (flag.default, *(flag.param_decls or ())) if each is not ...]
        names = "/".join(typed or [f"--{name.replace('_', '-')}"]).split("/")
        meaning, _, default = flag.help.replace("\\[", "[").partition(" (default: ")
        choices = [each for each in _types(parameter.annotation) if isinstance(each, str)]
        rows.append((_code(names), _code([default.removesuffix(")")]), _meaning(meaning, choices)))
    return _rows("option", rows)


def _table(options: _Described, prefix: str, *, deep: bool) -> str:
    rows = []
    for name, option in options.items():
        key = name.removeprefix(f"{prefix}.")
        if key == name or ("." in key and not deep):
            continue
        default = option["default"]
        if option["kind"] == "part":
            default = "null" if default == "false" else ""
        rows.append(
            (_code([key]), _code([default]), _meaning(option["help"], option.get("choices", ())))
        )
    return _rows("key", rows)


def _sections(options: _Described, kind: str) -> Iterable[str]:
    """A heading, a sentence and a table for each stage or allocation."""
    for name, option in options.items():
        if option["kind"] == kind:
            method = name.removeprefix(f"{kind}.")
            known = (ROOT / "docs" / "methods" / f"{method}.md").exists()
            link = f" See [{method}](../methods/{method}.md)." if known else ""
            yield f"### {method}\n\n{option['help']}.{link}"
            if table := _table(options, name, deep=False):
                yield table


def _is_flag(each: Any) -> bool:
    return isinstance(each, OptionInfo)


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words if word)


def _meaning(text: str, choices: Iterable[Any]) -> str:
    choices = list(map(str, choices))
    return text + (f" ({_code(choices)})" if choices else "")


def _rows(first: str, rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [(first, "default", "meaning"), ("---", "---", "---"), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) if len(lines) > 2 else ""


def main() -> None:
    """Write all of it."""
    DESCRIBED.write_text(described(), encoding="utf-8")
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
