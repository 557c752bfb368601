"""A measurement that nobody made."""

from __future__ import annotations

import torch

from secateur.report.documents.bench import (
    Bench,
    BenchFigure,
    BenchModel,
    BenchProtocol,
    Memory,
    Ratio,
    Repetition,
)
from secateur.runs.machine import describe_machine


def a_bench(result: str = "small") -> Bench:
    """A result that writes 1.25 times as fast as the dense model, known to 1 %."""
    return Bench(
        machine=describe_machine(torch.device("cpu")),
        protocol=BenchProtocol(
            threads=1, prefill=512, prompt=32, decode=64, turns=5, confidence=0.95
        ),
        models=[_model("dense", 0.5, None), _model(result, 0.4, "dense")],
        sound=True,
        busy_cores=0.1,
        seconds=60,
        notes=["This is made up."],
    )


def _model(label: str, seconds: float, base: str | None) -> BenchModel:
    turns = [Repetition(seconds=seconds, processor_seconds=seconds)] * 5
    ratio = Ratio(base=base, median=1.25, interval=(1.24, 1.26), range=(1.2, 1.3)) if base else None
    figures = [
        BenchFigure(
            work=work,
            batch=1,
            tokens=tokens,
            clock="processor",
            seconds=seconds,
            tokens_per_second=tokens / seconds if tokens else None,
            ratio=ratio,
            repetitions=turns,
        )
        for work, tokens in (("load", 0), ("prefill", 512), ("decode", 64))
    ]
    return BenchModel(
        label=label,
        path=label,
        runtime="llama.cpp",
        version="xllamacpp 1",
        form="Q8_0",
        device="cpu",
        file_bytes=int(1e8 * seconds),
        memory=Memory(before=10**7, loaded=10**8, peak=2 * 10**8),
        figures=figures,
    )
