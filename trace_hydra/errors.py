"""The exceptions a user can cause, one tree.

Each message says what was wrong, its value, where (config key or file and row) and what to do. `__main__` prints
them without a traceback.
"""

from collections.abc import Sequence


class TraceHydraError(Exception):
    """Base of every error that a user's input, configuration or data can cause."""


class ConfigError(TraceHydraError):
    """A configuration that cannot run."""


class DataError(TraceHydraError):
    """Data that cannot be read as a TRACE task; names the file and the row."""


class MethodError(TraceHydraError):
    """A method that was asked for what it cannot do, or that failed while training (a non-finite loss, say)."""


class CapabilityError(TraceHydraError):
    """A capability set, a judge or a teacher that cannot do its part; what was trained and scored stays."""


class EngineError(TraceHydraError):
    """An engine that gave no answers: a server that is down, weights that it cannot take."""


class StoreError(TraceHydraError):
    """A file or folder of a run that cannot be written, read or trusted."""


class DashboardError(TraceHydraError):
    """W&B did not take a page; says why and what to do, never the key."""


class Stopped(BaseException):
    """A signal asked the run to stop; the same command goes on from there. No `Exception`: nothing may swallow it."""

    def __init__(self, signal: str):
        super().__init__(f"stopped by {signal}")
        self.signal = signal


def problem_list(problems: Sequence[str]) -> str:
    """Join problems to one message: a single one as it is, several as a counted list."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])
