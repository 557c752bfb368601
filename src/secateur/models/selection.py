"""Work on some of a model's linears, and leave the others as they are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from secateur.models.experts import linear_shapes
from secateur.models.structure import BlockList
from secateur.runs.errors import SecateurError

_EXAMPLES = 3


def choose_linears(blocks: BlockList, only: Sequence[str], skip: Sequence[str]) -> BlockList:
    """Return the same blocks, of whose linears those are worked on that patterns choose.

    Args:
        blocks: of the model.
        only: patterns of full names as ``fnmatch`` has them; all linears if there are none.
        skip: patterns of those that are left out nevertheless.

    Raises:
        SecateurError: a pattern matches no linear, or none is left.
    """
    if not only and not skip:
        return blocks
    names = list(linear_shapes(blocks))
    for option, patterns in (("--only", only), ("--skip", skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                examples = difflib.get_close_matches(pattern, names, n=_EXAMPLES, cutoff=0.3)
                raise SecateurError(
                    f"{option} {pattern} matches none of the {len(names)} linears; their names "
                    f"are like {', '.join(examples or names[:_EXAMPLES])}."
                )
    wanted = [name for name in names if not only or _matches(name, only)]
    chosen = [name for name in wanted if not _matches(name, skip)]
    if not chosen:
        raise SecateurError("--only and --skip leave no linear; there is nothing to prune.")
    return replace(blocks, chosen=frozenset(chosen))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
