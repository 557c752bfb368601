"""Flags of commands, made from the options that they set."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from secateur.runs.errors import SecateurError

# What the option models say of themselves, written by docs/generate.py: importing the models takes
# seconds, for which help and wrong usage need not wait.
DESCRIBED: dict[str, dict[str, Any]] = json.loads(
    files("secateur.cli").joinpath("options.json").read_text(encoding="utf-8")
)
OPTIONS = DESCRIBED["options"]

Flags = Mapping[str, str]
"""The option that each flag sets, as ``OPTIONS`` names it, by what is typed."""

MACHINE: Flags = {"--device": "recipe.device", "--dtype": "recipe.dtype"}


def calibration(options: str) -> Flags:
    """Flags of calibration text in these options."""
    keys = {
        "--calibration": "source",
        "--samples": "samples",
        "--length": "length",
        "--seed": "seed",
        "--bos": "bos",
    }
    return {flag: f"{options}.calibration.{key}" for flag, key in keys.items()}


def current_forms(words: Sequence[str]) -> list[str]:
    """Words of a command line with flags of earlier versions in the form that they have now.

    ``--bos`` was a switch, and names a place now.
    """
    current: list[str] = []
    for word, behind in zip(words, [*words[1:], "--"], strict=False):
        if word == "--no-bos":
            current += ["--bos", "none"]
        elif word == "--bos" and behind.startswith("-"):
            current += ["--bos", "window"]
        else:
            current.append(word)
    return current


def _known_home(path: str) -> str:
    try:
        Path(path).expanduser()
    except RuntimeError as error:
        raise SecateurError(
            f"There is no user whose home folder {path} could be in; write the path out."
        ) from error
    return path


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="checkpoint folder, hub id, or .gguf file", callback=_known_home
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="checkpoint folder")]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="new or empty folder for the result, or that of an unfinished run of the same options",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="let the checkpoint's own code run")
]
MoreOptions = Annotated[
    Path | None,
    typer.Option(help="YAML with more options, nested as in the report; flags override its values"),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="start over in the folder of an earlier run")
]
EstimateOnly = Annotated[
    bool, typer.Option("--estimate", help="tell the peak memory that this would need, and end")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def with_flags(**groups: Flags | Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Put flags in the place of some parameters of a command.

    Where a group is a mapping, the parameter becomes the flags that it names, and the command
    receives the values of those that were given, nested as the options are. Where it is a function,
    the parameter becomes those of the function, and the command receives what it returns.
    """

    def decorate(command: Callable[..., Any]) -> Any:
        inner = {name: _parameters(group) for name, group in groups.items()}
        parameters: list[inspect.Parameter] = []
        for name, own in inspect.signature(command, eval_str=True).parameters.items():
            parameters += inner.get(name, [own.replace(kind=inspect.Parameter.KEYWORD_ONLY)])

        @functools.wraps(command)
        def call(**values: Any) -> Any:
            for name, group in groups.items():
                taken = {each.name: values.pop(each.name, each.default) for each in inner[name]}
                values[name] = group(**taken) if callable(group) else _given(group, taken)
            return command(**values)

        call.__annotations__ = {each.name: each.annotation for each in parameters}
        vars(call)["__signature__"] = inspect.Signature(parameters)
        return call

    return decorate


def _parameters(group: Flags | Callable[..., Any]) -> list[inspect.Parameter]:
    if callable(group):
        return list(inspect.signature(group).parameters.values())
    return [
        inspect.Parameter(
            _name(flag),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_type(option) | None, typer.Option(flag, help=_help(option))],
        )
        for flag, option in group.items()
    ]


def _name(flag: str) -> str:
    return flag.partition("/")[0].removeprefix("--").replace("-", "_")


def _type(option: str) -> Any:
    match OPTIONS[option]:
        case {"kind": "choice", "choices": choices}:
            return Literal[tuple(choices)]
        case {"kind": "whole number"}:
            return int
        case {"kind": "number"}:
            return float
        case {"kind": "switch" | "part" | "stages"}:
            return bool
        case {"kind": "names"}:
            return list[str]
    return str


def _help(option: str) -> str:
    described = OPTIONS[option]
    text, default = described["help"], described["default"]
    match described["kind"]:
        case "stages":
            text = text[0].lower() + text[1:]
        case "names":
            text += ", separated by commas or in several flags"
        case "switch" | "part":
            default = "yes" if default == "true" else "no"
    if OPTIONS.get(option.rpartition(".")[0], {}).get("default") == "false":
        # The part that it belongs to is left out unless the flag is given.
        default = "no"
    return text if default in ("", "null") else f"{text} (default: {default})"


def _given(group: Flags, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of flags that were given, nested as their options are."""
    given: dict[str, Any] = {}
    for flag, option in group.items():
        value = values[_name(flag)]
        # A flag that takes several values is an empty list if it is not given.
        if value is None or value == []:
            continue
        match OPTIONS[option]["kind"]:
            case "names":
                value = [name.strip() for each in value for name in each.split(",")]
            case "part":
                value = {} if value else None
        _, *parents, key = option.split(".")
        inner = given
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = value
    return given
