"""How text becomes tokens of a model: which token begins it, and which tokens there may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from secateur.runs.errors import SecateurError, explained
from secateur.text.beginning import Beginning

# Models tuned for chat end a turn, not a text, with their end-of-sequence token.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as secateur uses it, everywhere that text becomes tokens.

    Attributes:
        tokenizer: the model's.
        rows: of the model's input embedding; None if they are not known.
        bos: where the beginning-of-text token stands.
        token: the beginning-of-text token; None if the tokenizer has none.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: int | None
    bos: Beginning
    token: int | None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        bos: Beginning | None = None,
        rows: int | None = None,
    ) -> Encoder:
        """Find out which token begins a text; where it stands is the tokenizer's choice if None.

        Raises:
            SecateurError: there is no such token, or the model has no row for it.
        """
        own = _own_beginning(tokenizer)
        token = tokenizer.bos_token_id if own is None else own
        if bos is None:
            bos = "none" if own is None else "window"
        found = cls(tokenizer, rows, bos, None if token is None else int(token))
        if bos != "none":
            if token is None:
                raise SecateurError(
                    "The tokenizer has no beginning-of-text token; give --bos none, or leave it "
                    "out."
                )
            found.check([int(token)])
        return found

    @property
    def first(self) -> int | None:
        """The token that a text begins with, None without one."""
        return None if self.bos == "none" else self.token

    @property
    def of_window(self) -> int | None:
        """The token that every window begins with, None if windows begin with text."""
        return self.token if self.bos == "window" else None

    @property
    def of_text(self) -> int | None:
        """The token at the head of a text that is then cut into windows, None without one."""
        return self.token if self.bos == "text" else None

    @property
    def separator(self) -> int | None:
        """The token that separated documents when the model was trained.

        ``<|endoftext|>`` or ``<|end_of_text|>`` if the vocabulary has one, or else the
        end-of-sequence token, or else the beginning-of-sequence token; None if there is none.
        """
        vocabulary = self.tokenizer.get_vocab()
        for name in _END_OF_TEXT:
            if name in vocabulary:
                return int(vocabulary[name])
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return None

    @property
    def start(self) -> int | None:
        """The token that stands before a text where one has to, as in front of generated text."""
        return self.separator if self.first is None else self.first

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without special tokens.

        Raises:
            SecateurError: the tokenizer fails, or gives a token that the model has no row for.
        """
        found = _encode(self.tokenizer, texts, special=False)
        for ids in found:
            self.check(ids)
        return found

    def begun(self, text: str) -> list[int]:
        """Tokens of one text behind its beginning-of-text token, which is not doubled."""
        (ids,) = self.encode([text])
        return ids if self.first is None or ids[:1] == [self.first] else [self.first, *ids]

    def check(self, ids: Sequence[int]) -> None:
        """Raise SecateurError if the model's embedding has no row for one of the tokens."""
        if self.rows is not None and ids and (highest := max(ids)) >= self.rows:
            raise SecateurError(
                f"The tokenizer gives the token {self.name(highest)!r} of number {highest}, and "
                f"the model's embedding has {self.rows} rows; use the model's own tokenizer, or "
                "extend the embedding."
            )

    def name(self, token: int | None) -> str | None:
        """A token as the vocabulary writes it."""
        return None if token is None else str(self.tokenizer.convert_ids_to_tokens(token))


def _own_beginning(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The one token that the tokenizer itself puts before a text."""
    (bare,), (whole,) = (_encode(tokenizer, ["a"], special=each) for each in (False, True))
    count = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), len(whole))
    bos, before = tokenizer.bos_token_id, whole[:count]
    if bos in before or (bos is not None and getattr(tokenizer, "add_bos_token", False) is True):
        return int(bos)
    return before[0] if len(before) == 1 else None


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> list[list[int]]:
    with explained(
        "The tokenizer cannot make tokens of the text",
        "check its files, or use those of the model it was made for.",
    ):
        encoded = tokenizer(
            list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False
        )
        # Slow tokenizers give None for what they do not know.
        return [[int(token) for token in ids] for ids in encoded["input_ids"]]
