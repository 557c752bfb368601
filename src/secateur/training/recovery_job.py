"""A run of recovery whose inputs have been checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.models.checkpoint import Checkpoint
from secateur.models.masks import masks_path
from secateur.models.streamed import StreamedStore
from secateur.runs.device import resolve_device
from secateur.runs.errors import SecateurError
from secateur.runs.progress import Progress
from secateur.runs.run import Run
from secateur.training import job as training
from secateur.training.adapters import check_installed, count_parameters
from secateur.training.ranks import ALONE
from secateur.training.recovery_options import Recovery


@dataclass(frozen=True)
class Job:
    """What a run works on.

    Attributes:
        options: what to do.
        cut: the model to recover.
        dense: the model it was made from.
        training: the same as a run of training: text, output, device, dtype.
    """

    options: Recovery
    cut: Checkpoint
    dense: Checkpoint
    training: training.Job

    @property
    def run(self) -> Run:
        """The output folder."""
        return self.training.run

    @property
    def teacher(self) -> str:
        """The dense model, as the user named it."""
        assert self.training.teacher is not None, "options of recovery ask for a teacher"
        return self.training.teacher[0]

    @property
    def block_windows_SL(self) -> Tensor:
        """Text that blocks are fitted to."""
        return self.training.text.train_WL[: self.options.block_windows]

    def store(self, checkpoint: Checkpoint, output: Path | None) -> StreamedStore:
        """Give out a checkpoint's blocks, one at a time."""
        return checkpoint.store(self.training.device, output)


@contextmanager
def taken(
    name: str | Path,
    options: Recovery,
    output: Path,
    *,
    teacher: str | Path,
    data: Sequence[str],
    restart: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> Iterator[Job]:
    """Check everything that can be checked before work starts, then hold the output folder.

    Arguments are those of ``recover``.
    """
    Run.look(output, restart=restart)
    if options.network == "lora":
        check_installed()
    cut = Checkpoint.open(name, trust_remote_code=trust_remote_code)
    dense = Checkpoint.open(teacher, trust_remote_code=trust_remote_code)
    if masks_path(cut.folder, 0).is_file():
        raise SecateurError(
            f"{cut.folder} was pruned to a mask, which recovery would fill again; use "
            "`secateur train --preset keep-mask`."
        )
    if options.blocks is not None:
        _check_alike(cut, dense)
    trained = {"lora": count_parameters(cut.blocks, options.rank), "none": 0}
    with training.taken(
        name,
        options.training,
        output,
        data=data,
        validation=None,
        teacher=teacher,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=progress,
        device=resolve_device(options.device),
        ranks=ALONE,
        deciding={
            "recovery": options.model_dump(
                mode="json", include={"blocks", "block_windows", "network", "rank"}
            )
        },
        trained=trained.get(options.network),
    ) as job:
        yield Job(options, cut, dense, job)


def _check_alike(cut: Checkpoint, dense: Checkpoint) -> None:
    sizes = [(len(each.blocks), each.hidden_size) for each in (cut, dense)]
    if sizes[0] != sizes[1]:
        (blocks, width), (dense_blocks, dense_width) = sizes
        raise SecateurError(
            f"{cut.folder} has {blocks} blocks of hidden size {width} and the teacher "
            f"{dense_blocks} of {dense_width}, so none can be fitted to another; name the model "
            "that it was cut from, or leave that step out with --no-blocks."
        )
