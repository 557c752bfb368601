"""What is looked up: tables of blocks, notes, and texts side by side."""

from __future__ import annotations

from secateur.report.content import Continuation, Continuations, Lines, Table
from secateur.report.facts import Facts
from secateur.report.format import number_text, percent_text, seconds_text, width_text
from secateur.report.runs import Run


def block_table(run: Run) -> Table | None:
    """Every block of a pruned model."""
    rows = []
    for position, block in enumerate(run.report.items("blocks") if run.kind == "prune" else []):
        linears = dict(block.pairs("linears"))
        zeros = sum(linear.number("zeros") or 0 for linear in linears.values())
        weights = sum(linear.number("weights") or 0 for linear in linears.values())
        errors = {
            name: error
            for name, linear in linears.items()
            if (error := linear.number("relative_error")) is not None
        }
        worst = max(errors, key=errors.__getitem__) if errors else ""
        rows.append(
            (
                number_text(block.number("index") or position, "{:.0f}"),
                percent_text(zeros / weights, 2) if weights else "",
                number_text(block.number("held_out_error"), "{:.4f}"),
                worst,
                number_text(errors.get(worst), "{:.4f}"),
                seconds_text(sum(each.number() or 0 for _, each in block.pairs("seconds"))),
            )
        )
    if not rows:
        return None
    head = ["block", "sparsity", "held-out error", "worst linear", "its error", "time"]
    return Table("", head, rows, folded=True)


def width_table(run: Run) -> Table | None:
    """Every sub-block of a shrunk model."""
    rows = [
        (
            f"{number_text(each.number('block'), '{:.0f}')} {each.text('kind') or ''}",
            _width(each, "kept", "queries"),
            _width(each, "of", "queries_of"),
            number_text(each.number("penalty"), "{:.4f}"),
            number_text(each.number("next_penalty"), "{:.4f}"),
            number_text(each.number("error_without_refit"), "{:.4f}"),
            number_text(each.number("held_out_error"), "{:.4f}"),
        )
        for each in run.report.items("sub_blocks")
    ]
    if not rows:
        return None
    head = ["sub-block", "kept", "of", "expected KL", "if narrower", "without refit", "error"]
    return Table("", head, rows, folded=True)


def _width(sub_block: Facts, units: str, queries: str) -> str:
    count = sub_block.number(units)
    if count is None:
        return ""
    return width_text(count, sub_block.number(queries), sub_block.number("queries_of"))


def curve_table(run: Run) -> Table | None:
    """Every size of a curve."""
    rows = [
        (
            "" if (share := point.number("removed")) is None else percent_text(share, 1),
            number_text(point.number("blocks_after"), "{:,.0f}"),
            number_text(point.number("divergence"), "{:.4f}"),
            str(sum(width.number() == 0 for _, width in point.pairs("widths"))),
        )
        for point in run.report.items("points")
        if run.kind == "curve"
    ]
    if not rows:
        return None
    head = ["removed", "parameters left in blocks", "expected KL, nats", "sub-blocks gone"]
    return Table("", head, rows, folded=True)


def notes(run: Run) -> Lines | None:
    """What the run wants to be known."""
    lines = run.report.texts("notes")
    for position, block in enumerate(run.report.items("blocks")):
        index = block.number("index")
        name = f"{position if index is None else index:.0f}"
        lines += [f"block {name}: {note}" for note in block.texts("notes")]
    for evaluation in run.evaluations:
        lines += evaluation.texts("notes")
    lines += [f"{name} beside the report is no readable JSON." for name in run.unread]
    return Lines("", lines, folded=len(lines) > 6) if lines else None


def continuations(run: Run) -> Continuations | None:
    """How the dense and the pruned model go on with the same texts."""
    found = run.continuations
    entries = []
    for each in found.items("continuations"):
        dense, pruned = (each.at(name).value for name in ("dense", "pruned"))
        prompt = each.text("prompt")
        if prompt and isinstance(dense, str) and isinstance(pruned, str):
            # The space before the first word belongs to the prompt.
            dense, pruned = (text.lstrip("\n").removeprefix(" ") for text in (dense, pruned))
            same = _same_beginning(dense, pruned)
            entries.append(Continuation(prompt, dense[:same], dense[same:], pruned[same:]))
    if not entries:
        return None
    tokens = found.number("tokens")
    caption = (
        f"The likeliest token each time, {number_text(tokens, '{:.0f}')} tokens at most, no chat "
        f"template, {found.text('dtype') or 'unknown dtype'} on {found.text('device') or '?'}. "
        f"Dense: {found.text('reference') or '?'}. What both write alike is grey."
    )
    return Continuations("", entries, caption)


def _same_beginning(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
