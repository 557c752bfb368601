"""Who runs: a method, what follows it, and a pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass

OURS, PEER = "secateur", "llm-compressor"
PEER_METHODS = ("sparsegpt", "wanda")


@dataclass(frozen=True)
class Contender:
    """What to do and to what pattern.

    Written ``METHOD[@ALLOCATION][+permute][+barber|+swaps][+refit][+reconstruct]-PATTERN``, the
    pattern a percentage or n:m; permute runs before the method.
    """

    name: str
    method: str
    allocation: str | None
    permute: bool
    rebuild: str | None
    refit: bool
    reconstruct: bool
    pattern: str | None
    sparsity: float

    @classmethod
    def parse(cls, name: str) -> Contender:
        """Read a contender's name.

        Raises:
            SystemExit: it has another form.
        """
        match = re.fullmatch(
            r"([\w-]+?)(?:@(\w+))?(\+permute)?(?:\+(barber|swaps))?(\+refit)?(\+reconstruct)?"
            r"-(?:(\d+(?:\.\d+)?)|(\d+):(\d+))",
            name,
        )
        if match is None:
            raise SystemExit(
                f"{name!r} is not a contender; write METHOD[@ALLOCATION][+permute][+barber|+swaps]"
                "[+refit][+reconstruct]-PATTERN, such as sparsegpt-50 or wanda+refit-2:4."
            )
        method, allocation, permute, rebuild, refit, reconstruct, *target = match.groups()
        percent, kept, group = target
        return cls(
            name=name,
            method=method,
            allocation=allocation,
            permute=permute is not None,
            rebuild=rebuild,
            refit=refit is not None,
            reconstruct=reconstruct is not None,
            pattern=None if percent else f"{kept}:{group}",
            sparsity=float(percent) / 100 if percent else 1 - int(kept) / int(group),
        )

    @property
    def flags(self) -> list[str]:
        """Options that both tools' commands understand."""
        target = ["--pattern", self.pattern] if self.pattern else ["--sparsity", str(self.sparsity)]
        return ["--method", self.method, *target]

    @property
    def own_flags(self) -> list[str]:
        """Options that only our command understands."""
        flags = ["--permute"] if self.permute else []
        if self.method != "auto":
            flags += ["--refit" if self.refit else "--no-refit"]
            flags += ["--rebuild", self.rebuild] if self.rebuild else []
            flags += ["--reconstruct"] if self.reconstruct else []
        return flags + (["--allocate", self.allocation] if self.allocation else [])

    @property
    def plain(self) -> bool:
        """A method alone, which other tools may have as well."""
        others = (self.allocation, self.permute, self.rebuild, self.refit, self.reconstruct)
        return not any(others)

    @property
    def tools(self) -> tuple[str, ...]:
        """Who can do this, in the order in which they run."""
        return (PEER, OURS) if self.method in PEER_METHODS and self.plain else (OURS,)

    @property
    def method_label(self) -> str:
        """Method as shown in the table."""
        method = f"{self.method}, {self.allocation} plan" if self.allocation else self.method
        method = "permute + " * self.permute + method
        if self.rebuild:
            method += f" + {self.rebuild}"
        return method + " + refit" * self.refit + " + reconstruct" * self.reconstruct

    @property
    def pattern_label(self) -> str:
        """Pattern as shown in the table."""
        return self.pattern or f"{100 * self.sparsity:g}%"
