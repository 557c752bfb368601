"""Where the beginning-of-text token stands: what options, reports and tables call it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

Beginning = Literal["window", "text", "none"]
"""Where the beginning-of-text token stands: in every window, at the head of a text, or nowhere."""


def read_beginning(value: Any) -> Any:
    """What recipes and reports of earlier versions say, in the words of this one."""
    if isinstance(value, bool):
        return "window" if value else "none"
    return "window" if value == "each window" else value


BeginningOption = Annotated[Beginning | None, BeforeValidator(read_beginning)]
BEGINNING = (
    "where the beginning-of-text token stands: in every window, once at the head of the text, or "
    "nowhere; by default in every window if the tokenizer adds one, else nowhere"
)
"""What options say of it."""


def beginning_text(beginning: object) -> str:
    """What tables say of it; reports of earlier versions have other values."""
    match read_beginning(beginning):
        case "window":
            return "a beginning-of-text token in every window"
        case "text":
            return "one beginning-of-text token at the head of the text"
        case "none":
            return "no beginning-of-text token"
    return "beginning-of-text token unknown"


def prompt_text(beginning: object) -> str:
    """What tables say of it in front of the prompts of tasks; each prompt is a text."""
    match read_beginning(beginning):
        case "window" | "text":
            return "prompts begin with the beginning-of-text token"
        case "none":
            return "no beginning-of-text token"
    return "beginning-of-text token unknown"
