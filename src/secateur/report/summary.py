"""What was done in runs, and the numbers that matter most of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from statistics import fmean

from secateur.report.format import (
    bytes_text,
    count_text,
    number_text,
    percent_text,
    seconds_text,
)
from secateur.report.parts import Definitions, KeyFigure, KeyFigures, Part, Table
from secateur.report.run_files import Json, Run
from secateur.report.speed import measured_figures
from secateur.text.beginning import beginning_text

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
_RESUMED = {"resumed_blocks": "blocks ", "resumed_steps": "steps ", "resumed": ""}
# Key figures that stand behind all others.
_COSTS = ("time", "peak memory")
# Digits of a checksum that tell two texts apart.
DIGEST = 12


def headline(run: Run) -> str:
    """What was done, in a few words."""
    report = run.report
    match run.kind:
        case "prune":
            stages = [stage.text("method") for stage in report.items("recipe", "stages")]
            words = [" + ".join(filter(None, stages)), _pattern_words(pattern_of(run))]
        case "shrink":
            removed = percent_text(report.number("parameters", "removed"), 1)
            words = [f"{removed} of the blocks removed" if removed else "", _form(report)]
        case "recover":
            network = {"lora": "merged LoRA", "full": "all parameters"}.get(
                report.text("options", "network") or ""
            )
            blocks = "blocks" if report.items("blocks") else ""
            words = [" + ".join(filter(None, [blocks, network]))]
        case "train":
            tokens = number_text(report.number("tokens"), "{:,.0f} tokens")
            words = [_pattern_words(pattern_of(run)), tokens]
        case _:
            words = [f"{len(report.items('points'))} sizes"]
    said = ", ".join(filter(None, words))
    return f"{_VERBS[run.kind]}: {said}" if said else _VERBS[run.kind]


def pattern_of(run: Run) -> str | None:
    """The pattern the zeros have; None if there is none or it is not known."""
    if run.kind == "prune":
        return run.report.text("recipe", "pattern")
    # A mask that is kept is that of the model which came in, whatever its pattern.
    if run.kind == "train" and run.report.number("options", "masks", "frozen_share") != 1:
        return run.report.text("options", "pattern")
    return None


def digest_text(digest: str | None) -> str:
    """The beginning of a checksum."""
    return f"sha256 {digest[:DIGEST]}…" if digest else ""


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
    report, taught = run.report, run.kind in _TAUGHT
    pattern = pattern_of(run)
    yield "Model", report.text("model") or ""
    if taught:
        yield "Teacher", report.text("teacher") or "none"
    yield (
        "Stages",
        " → ".join(_options(stage, "method") for stage in report.items("recipe", "stages")),
    )
    yield "Pattern", _pattern_words(pattern)
    if run.kind == "train" and pattern is None:
        yield "Pattern", "the mask of the model that came in"
    yield "Allocation", _options(report.at("recipe", "allocation"), "method")
    if run.kind != "prune":
        hidden = {"sparsity", "form"} if run.kind == "curve" else set[str]()
        yield "Options", _options(report.at("options"), "" if taught else "preset", hidden)
    if run.kind == "train":
        share = percent_text(report.number("low_rank", "share"), 1)
        beside = f", {share} of the linears' weights" if share else ""
        parameters = report.number("low_rank", "parameters")
        yield "Low rank", number_text(parameters, "{:,.0f} dense parameters more" + beside)
    yield "Text" if taught else "Calibration", _text(report)
    device, dtype = report.text("machine", "device"), report.text("forward_dtype")
    yield "Forward passes", f"{dtype} on {device}" if dtype and device else dtype or ""
    streamed = report.at("streamed").value
    if isinstance(streamed, bool):
        yield "In memory", "one block at a time" if streamed else "the whole model"
    processor = report.text("machine", "processor")
    cores = number_text(report.number("machine", "cores"), "{:.0f} cores")
    yield "Machine", ", ".join(filter(None, [processor, cores]))
    versions = [
        f"{name} {each.text() or '?'}" for name, each in report.pairs("machine", "versions")
    ]
    if python := report.text("machine", "python"):
        versions.append(f"Python {python}")
    yield "Versions", ", ".join(versions)
    phases = [
        f"{phase} {seconds_text(value)}"
        for phase, each in report.pairs("seconds")
        if phase != "total" and (value := each.number()) is not None and value >= 0.05
    ]
    yield "Time", ", ".join(phases)
    resumed = [(report.number(key), what) for key, what in _RESUMED.items()]
    said = [f"{count:.0f} {what}done by an earlier session" for count, what in resumed if count]
    yield "Resumed", said[0] if said else ""


def _options(options: Json, first: str, without: AbstractSet[str] = frozenset()) -> str:
    """``wanda (scope row)``: the value of a key, then all others that say something."""
    name = options.text(first) if first else None
    hidden = _HIDDEN | without | _OF_OTHER_PRESETS.get(name or "", set())
    others = ", ".join(
        f"{key.replace('_', ' ')} {_value(each.value)}"
        for key, each in options.pairs()
        if key != first and key not in hidden and each
    )
    if name is None:
        return others
    return f"{name} ({others})" if others else name


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
    try:
        return f"{percent_text(float(pattern or ''))} unstructured"
    except ValueError:
        return pattern or ""


def _form(report: Json) -> str:
    return {"uniform": "same widths in all blocks", "padded": "padded with zeros"}.get(
        report.text("options", "form") or "", "a width for each sub-block"
    )


def _text(report: Json) -> str:
    """What the calibration, or training, text was."""
    text = report.at("text") or report.at("calibration")
    parts, bos = [], text.at("bos").value
    for part in text.items("parts"):
        counts = [part.number(key) for key in ("samples", "windows")]
        windows = [f", {count:,.0f} windows" for count in counts if count is not None]
        parts.append((part.text("source") or "text") + "".join(windows[:1]))
    words = [
        " + ".join(parts) or text.text("source"),
        number_text(text.number("length"), "of {:,.0f} tokens"),
        number_text(text.number("tokens"), "= {:,.0f} tokens"),
        number_text(text.number("seed"), "(seed {:.0f})"),
        "" if bos is None else f"with {beginning_text(bos)}",
        digest_text(text.text("sha256")),
    ]
    return " ".join(filter(None, words))


def glance(runs: Sequence[Run]) -> list[Part]:
    """The key figures of one run, or a table of those of several."""
    found = [
        [
            *own_figures(run),
            *_evaluated_figures(run),
            *measured_figures(run),
            *_costs(run.report),
        ]
        for run in runs
    ]
    if len(runs) == 1:
        return [KeyFigures(found[0])] if found[0] else []
    values = [{_comparable(each): _with_dense(each) for each in entries} for entries in found]
    labels = dict.fromkeys(label for each in values for label in each)
    rows = [
        ("what was done", *map(headline, runs)),
        *(
            (label, *(each.get(label, "") for each in values))
            for label in sorted(labels, key=_COSTS.__contains__)
        ),
    ]
    return [Table("", ["", *(run.label for run in runs)], rows, style="compared")]


def _comparable(figure: KeyFigure) -> str:
    return f"{figure.label}, {figure.protocol}" if figure.protocol else figure.label


def _with_dense(figure: KeyFigure) -> str:
    """No figure without that of the dense model, where there is one."""
    return f"{figure.value} ({figure.beside})" if "dense" in figure.beside else figure.value


def own_figures(run: Run) -> Iterator[KeyFigure]:
    """What the run itself says of its result."""
    report = run.report
    if (counted := report.number("sparsity", "counted")) is not None:
        zeros, weights = report.number("sparsity", "zeros"), report.number("sparsity", "weights")
        counts = "" if zeros is None or weights is None else f"{zeros:,.0f} of {weights:,.0f}"
        yield KeyFigure("zeros in the linears, counted", percent_text(counted, 2), counts)
    errors = [block.number("held_out_error") for block in report.items("blocks")]
    known = [error for error in errors if error is not None]
    if known:
        yield KeyFigure("mean error of a block", f"{fmean(known):.4f}", "relative, held-out tokens")
    if run.kind == "shrink":
        yield from _shrunk_figures(report)
    if run.kind in _TAUGHT:
        yield from _trained_figures(report, report.at("network") or report)


def _shrunk_figures(report: Json) -> Iterator[KeyFigure]:
    parameters = report.at("parameters")
    if (removed := parameters.number("removed")) is not None:
        before, after = parameters.number("blocks_before"), parameters.number("blocks_after")
        known = before is not None and after is not None
        sizes = f"{count_text(before or 0)} to {count_text(after or 0)}" if known else ""
        yield KeyFigure("removed from the blocks", percent_text(removed, 2), sizes)
    before, after = parameters.number("model_before"), parameters.number("model_after")
    if before is not None and after is not None:
        yield KeyFigure("parameters in files", count_text(after), f"dense {count_text(before)}")
    if (expected := report.number("survey", "predicted_divergence")) is not None:
        yield KeyFigure("expected KL", f"{expected:.4f}", "nats per token, by a fit to sub-models")


def _trained_figures(report: Json, steps_of: Json) -> Iterator[KeyFigure]:
    validation = report.at("validation")
    if (after := validation.number("after")) is not None:
        others = [
            number_text(validation.number(key), key + " {:.4f}") for key in ("before", "dense")
        ]
        beside = ", ".join(filter(None, others))
        yield KeyFigure("held-out loss, nats per token", f"{after:.4f}", beside)
    if (tokens := steps_of.number("tokens")) is not None:
        steps = number_text(steps_of.number("steps"), "in {:,.0f} steps")
        yield KeyFigure("tokens trained on", f"{tokens:,.0f}", steps)


def _evaluated_figures(run: Run) -> Iterator[KeyFigure]:
    for evaluation in run.evaluations:
        protocol = evaluation.at("protocol")
        sizes = " × ".join(number_text(protocol.number(key)) for key in ("windows", "window"))
        text = f"{protocol.text('text') or 'unknown text'}, {sizes} tokens"
        text += f", {beginning_text(protocol.text('bos'))}"
        if (perplexity := evaluation.number("model", "perplexity")) is not None:
            dense = number_text(evaluation.number("dense", "perplexity"), "dense {:.2f}")
            yield KeyFigure("perplexity", f"{perplexity:.2f}", dense, text)
        answers = evaluation.at("zero_shot")
        if (accuracy := answers.number("model", "mean_acc")) is not None:
            of_dense = percent_text(answers.number("dense", "mean_acc"), 1)
            tasks = ", ".join(task for task, _ in answers.pairs("model", "tasks"))
            questions = tasks + number_text(answers.number("limit"), ", first {:.0f} of each")
            beside = f"dense {of_dense}" if of_dense else ""
            yield KeyFigure("mean accuracy", percent_text(accuracy, 1), beside, questions)
        if (kl := evaluation.number("divergence", "kl")) is not None:
            yield KeyFigure("KL from dense", f"{kl:.4f}", "nats per token", text)


def _costs(report: Json) -> Iterator[KeyFigure]:
    totals = [report.number("seconds", "total"), report.number("seconds")]
    for seconds in [each for each in totals if each is not None][:1]:
        device = report.text("machine", "device")
        cores = number_text(report.number("machine", "cores"), "on {:.0f} cores")
        place = f"on {device}" if device and device != "cpu" else cores
        yield KeyFigure(_COSTS[0], seconds_text(seconds), place)
    if (peak := report.number("peak_memory_bytes")) is not None:
        device_peak = report.number("peak_device_memory_bytes")
        beside = "" if device_peak is None else f"{bytes_text(device_peak)} on the device"
        yield KeyFigure(_COSTS[1], bytes_text(peak), beside)
