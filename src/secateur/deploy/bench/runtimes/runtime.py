"""What measuring asks of a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from secateur.deploy.bench.runtimes import RUNTIMES
from secateur.runs.errors import SecateurError

if TYPE_CHECKING:
    from secateur.runs.device import DtypeName


@dataclass(frozen=True)
class Settings:
    """How a runtime is to run.

    Attributes:
        threads: that it computes with.
        batch: the most sequences at once.
        length: the most tokens of a sequence.
        device: of transformers.
        dtype: of transformers.
        trust_remote_code: let a checkpoint's own code run.
    """

    threads: int
    batch: int
    length: int
    device: str = "cpu"
    dtype: DtypeName = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Opened:
    """What is known of a model before it is loaded.

    Attributes:
        form: what its weights are computed in, or stored as, in the runtime's words.
        device: that it runs on.
        file_bytes: of its weights on disk.
        memory_bytes: of its weights in memory.
        token_bytes: of memory for each token of each sequence, as far as it is known.
        vocabulary: number of tokens.
        positions: the most tokens of a sequence; None if nothing limits them.
    """

    form: str
    device: str
    file_bytes: int
    memory_bytes: int
    token_bytes: int
    vocabulary: int
    positions: int | None


class Session(Protocol):
    """A model that is loaded."""

    @property
    def kernel(self) -> str:
        """What multiplies most matrices, in the runtime's words; empty if it does not say."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, started: Callable[[], None]
    ) -> int:
        """Go on with all prompts at once, the likeliest token each time, past any end of text.

        Args:
            prompts: tokens, as many in each.
            tokens: that each sequence goes on with.
            started: called once, when every sequence has its first token.

        Returns:
            Tokens written, of all sequences together.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Runtime(Protocol):
    """A program that runs models. No instance holds one; ``load`` returns it.

    Attributes:
        name: what users call it.
        package: that brings it, as pip calls it.
        module: that it is imported by.
        extra: of secateur, that installs it; empty if it is always there.
    """

    name: str
    package: str
    module: str
    extra: str

    def reads(self, path: Path) -> bool:
        """Whether a file or folder is of the kind that it opens, by its name and its files."""
        ...

    def check(self, path: Path, settings: Settings) -> Opened:
        """Look at a model without loading it.

        Raises:
            SecateurError: it is damaged, or cannot run as the settings say.
        """
        ...

    def load(self, path: Path, settings: Settings) -> Session:
        """Load a model, in a process of its own."""
        ...


def find_runtime(name: str) -> Runtime:
    """Return the registered runtime of this name."""
    module, _, kind = RUNTIMES[name].partition(".")
    home = import_module(f"secateur.deploy.bench.runtimes.{module}")
    found: Runtime = getattr(home, kind)()
    return found


def is_installed(runtime: Runtime) -> bool:
    """Whether the package of a runtime is there."""
    return find_spec(runtime.module) is not None


def require_installed(runtime: Runtime, path: Path) -> None:
    """Raise SecateurError with the command that installs a runtime, unless it is there."""
    if not is_installed(runtime):
        raise SecateurError(
            f"{path} is run by {runtime.name}, which is not installed; "
            f"`pip install 'secateur[{runtime.extra}]'`, or {runtime.package} by itself, brings it."
        )


def version_of(runtime: Runtime) -> str:
    """The version of a runtime's package, with its name where that is another."""
    number = version(runtime.package)
    return number if runtime.package == runtime.name else f"{runtime.package} {number}"
