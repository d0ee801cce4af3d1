"""Stand-ins: a tokenizer of letters, a run of two tasks, a logger that remembers, a clock to set by hand."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from trace_hydra.plan import RunInfo, Stage


class Letters:
    """A tokenizer whose ids are code points; 2 ends."""

    eos_token_id = 2

    def decode(self, ids, **_):
        return "".join(chr(96 + one) for one in ids if one > 2)

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


class Recorder(Logger):
    """Keeps what is logged: [(metrics, step), ...]."""

    def __init__(self):
        super().__init__()
        self.entries: list[tuple[dict[str, float], int | None]] = []

    name = version = "recorder"  # type: ignore[assignment]

    def log_metrics(self, metrics, step=None):
        self.entries.append((dict(metrics), step))

    def log_hyperparams(self, *args: Any, **kwargs: Any):
        pass


class Clock:
    """Stands still until a test moves `now`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def two_tasks(directory: Path) -> RunInfo:
    """Stages A (100 tokens) and B (300 tokens); cells: row 0 A and B, row 1 A, row 2 A and B; 10 rows A, 20 rows B."""
    return RunInfo(
        name="tiny-plain-full-mini-trace-seed0-12345678",
        directory=directory,
        model="tiny",
        method="plain",
        tuning="full",
        data="mini",
        task_order="trace",
        tasks=("A", "B"),
        seed=0,
        protocol="greedy",
        fingerprint="0123456789ab",
        config={"seed": {"train": 0}},
        stages=(Stage(1, "A", 8, 1, 2, 100, "ka"), Stage(2, "B", 8, 1, 4, 300, "kb")),
        cells=((0, "A", 10), (0, "B", 20), (1, "A", 10), (2, "A", 10), (2, "B", 20)),
    )
