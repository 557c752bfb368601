"""What was done, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from secateur.report.content import Definitions
from secateur.report.facts import Facts
from secateur.report.format import percent_text, seconds_text
from secateur.report.runs import Run

_VERBS = {
    "prune": "pruned",
    "shrink": "shrunk",
    "recover": "recovered",
    "train": "trained",
    "curve": "sizes compared",
}
# Options that are told elsewhere, or decide nothing.
_HIDDEN = {"calibration", "device", "dtype"}
_OF_OTHER_PRESETS = {"default": {"step", "masks", "prior"}, "paper": {"sub_models", "grid"}}
# Runs that learn from a dense model.
_TAUGHT = ("train", "recover")
# Digits of a checksum that tell two texts apart.
DIGEST = 12


def headline(run: Run) -> str:
    """What was done, in a few words."""
    report = run.report
    match run.kind:
        case "prune":
            stages = [stage.text("method") for stage in report.items("recipe", "stages")]
            words = [
                " + ".join(filter(None, stages)),
                _pattern_words(pattern_of(run)),
            ]
        case "shrink":
            removed = report.number("parameters", "removed")
            share = "" if removed is None else f"{percent_text(removed, 1)} of the blocks removed"
            words = [share, _form(report)]
        case "recover":
            words = [_recovery_words(report)]
        case "train":
            words = [_pattern_words(pattern_of(run))]
            tokens = report.number("tokens")
            words.append("" if tokens is None else f"{tokens:,.0f} tokens")
        case _:
            words = [f"{len(report.items('points'))} sizes"]
    said = ", ".join(word for word in words if word)
    return f"{_VERBS[run.kind]}: {said}" if said else _VERBS[run.kind]


def _recovery_words(report: Facts) -> str:
    network = {"lora": "merged LoRA", "full": "all parameters"}.get(
        report.text("options", "network") or ""
    )
    return " + ".join(filter(None, ["blocks" if report.items("blocks") else "", network]))


def pattern_of(run: Run) -> str | None:
    """The pattern the zeros have; None if there is none or it is not known."""
    if run.kind == "prune":
        return run.report.text("recipe", "pattern")
    # A mask that is kept is that of the model which came in, whatever its pattern.
    if run.kind == "train" and run.report.number("options", "masks", "frozen_share") != 1:
        return run.report.text("options", "pattern")
    return None


def done(runs: Sequence[Run]) -> list[Definitions]:
    """What was done, with what: first what is common to all runs, then what is not."""
    found = [[(term, text) for term, text in _done(run) if text] for run in runs]
    if len(runs) == 1:
        return [Definitions("", found[0])]
    common = [entry for entry in found[0] if all(entry in entries for entries in found)]
    own = [[entry for entry in entries if entry not in common] for entries in found]
    titled = [("In all runs", common), *zip((run.label for run in runs), own, strict=True)]
    return [Definitions(title, entries) for title, entries in titled if entries]


def _done(run: Run) -> Iterator[tuple[str, str]]:
    report = run.report
    yield "Model", report.text("model") or ""
    if run.kind in _TAUGHT:
        yield "Teacher", report.text("teacher") or "none"
    yield "Stages", _stages(report)
    yield "Pattern", _pattern_words(pattern_of(run))
    if run.kind == "train" and pattern_of(run) is None:
        yield "Pattern", "the mask of the model that came in"
    yield "Allocation", _options(report.at("recipe", "allocation"), "method")
    if run.kind == "shrink":
        yield "Options", _options(report.at("options"), "preset")
    if run.kind == "curve":
        yield "Options", _options(report.at("options"), "preset", {"sparsity", "form"})
    if run.kind in _TAUGHT:
        yield "Options", _options(report.at("options"), "")
    if run.kind == "train":
        yield "Low rank", _low_rank(report)
    yield "Text" if run.kind in _TAUGHT else "Calibration", _text(report)
    device = report.text("machine", "device")
    dtype = report.text("forward_dtype")
    yield "Forward passes", f"{dtype} on {device}" if dtype and device else dtype or ""
    streamed = report.at("streamed").value
    if isinstance(streamed, bool):
        yield "In memory", "one block at a time" if streamed else "the whole model"
    yield "Machine", _machine(report)
    yield "Versions", ", ".join(_versions(report))
    phases = [
        f"{phase} {seconds_text(value)}"
        for phase, each in report.pairs("seconds")
        if phase != "total" and (value := each.number()) is not None and value >= 0.05
    ]
    yield "Time", ", ".join(phases)
    yield "Resumed", _resumed(report)


def _resumed(report: Facts) -> str:
    for key, what in {"resumed_blocks": "blocks", "resumed_steps": "steps", "resumed": ""}.items():
        if count := report.number(key):
            return f"{count:.0f} {what} done by an earlier session".replace("  ", " ")
    return ""


def _stages(report: Facts) -> str:
    return " → ".join(_options(stage, "method") for stage in report.items("recipe", "stages"))


def _options(options: Facts, first: str, without: AbstractSet[str] = frozenset()) -> str:
    """``wanda (scope row)``: the value of a key, then all others that say something."""
    name = options.text(first) if first else None
    hidden = _HIDDEN | without | _OF_OTHER_PRESETS.get(name or "", set())
    others = [
        f"{key.replace('_', ' ')} {_value(each.value)}"
        for key, each in options.pairs()
        if key != first and key not in hidden and each
    ]
    if name is None:
        return ", ".join(others)
    return f"{name} ({', '.join(others)})" if others else name


def _value(value: object) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{key.replace('_', ' ')} {_value(each)}" for key, each in value.items())
        return f"({inner})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return " and ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pattern_words(pattern: str | None) -> str:
    if pattern is None:
        return ""
    try:
        return f"{percent_text(float(pattern))} unstructured"
    except ValueError:
        return pattern


def _form(report: Facts) -> str:
    return {"uniform": "same widths in all blocks", "padded": "padded with zeros"}.get(
        report.text("options", "form") or "", "a width for each sub-block"
    )


def _low_rank(report: Facts) -> str:
    parameters, share = report.number("low_rank", "parameters"), report.number("low_rank", "share")
    if parameters is None:
        return ""
    beside = "" if share is None else f", {percent_text(share, 1)} of the linears' weights"
    return f"{parameters:,.0f} dense parameters more{beside}"


def _text(report: Facts) -> str:
    """What the calibration, or training, text was."""
    text = report.at("text") or report.at("calibration")
    parts = [
        f"{part.text('source') or 'text'}"
        + next(
            (
                f", {count:,.0f} windows"
                for key in ("samples", "windows")
                if (count := part.number(key)) is not None
            ),
            "",
        )
        for part in text.items("parts")
    ]
    words = [" + ".join(parts) or text.text("source") or ""]
    if (length := text.number("length")) is not None:
        words.append(f"of {length:,.0f} tokens")
    if (tokens := text.number("tokens")) is not None:
        words.append(f"= {tokens:,.0f} tokens")
    if (seed := text.number("seed")) is not None:
        words.append(f"(seed {seed:.0f})")
    if digest := text.text("sha256"):
        words.append(f"sha256 {digest[:DIGEST]}…")
    return " ".join(word for word in words if word)


def _machine(report: Facts) -> str:
    machine = report.at("machine")
    cores = machine.number("cores")
    words = [machine.text("processor"), None if cores is None else f"{cores:.0f} cores"]
    return ", ".join(word for word in words if word)


def _versions(report: Facts) -> Iterator[str]:
    for name, version in report.pairs("machine", "versions"):
        yield f"{name} {version.text() or '?'}"
    if python := report.text("machine", "python"):
        yield f"Python {python}"
