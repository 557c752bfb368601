"""What a model is evaluated on."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from secateur.runs.options import Options
from secateur.text.beginning import BEGINNING, BeginningOption


class EvaluationOptions(Options):
    """The material of an evaluation, whichever model it is."""

    text: str | Path | None = Field(
        None, description="a .txt or .jsonl file; either this or dataset"
    )
    dataset: str | None = Field(None, description="wikitext2 or USER/NAME[:CONFIG][:SPLIT]")
    window: int = Field(
        1024, ge=2, le=2**24, description="tokens per window; windows do not overlap"
    )
    max_windows: int | None = Field(
        None, ge=1, le=2**40, description="only the first so many windows"
    )
    bos: BeginningOption = Field(None, description=BEGINNING)
    tasks: tuple[str, ...] = Field((), description="zero-shot tasks; see `secateur ls tasks`")
    task_data: str | Path | None = Field(
        None, description="folder of TASK_SPLIT.jsonl files instead of the hub"
    )
    limit: int | None = Field(
        None, ge=1, le=2**40, description="only the first so many questions of each task"
    )
