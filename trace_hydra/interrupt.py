"""Signals that ask a run to stop: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trace_hydra.errors import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
EXIT_AT_ONCE = 130


class Interrupts:
    """Raises `Stopped` where a signal arrives; within `hold`, a little later, when nothing is lost any more.

    A second Ctrl-C ends the process at once. Handlers are those of before when the context is left; in a thread other
    than the main one nothing is done.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal that arrived."""
        self.deaf = False
        """Whether signals do nothing any more. To be set first where the process is about to end, then `ignore`."""
        self._held = 0
        self._interrupted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def install(self) -> None:
        """Take the signals (again: Lightning puts a handler of its own on SIGTERM for each fit)."""
        for number in SIGNALS if self._before or threading.current_thread() is threading.main_thread() else ():
            signal.signal(number, self._handle)

    def ignore(self) -> None:
        """Ignore the signals until the process is gone: Python drops handlers, even deaf ones, some time before that.

        Processes that it starts ignore them too.
        """
        self.deaf = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait with `Stopped` until the end of the block, unless it looks at `requested` itself."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self.check()

    def check(self) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self.requested is not None and not self._held:
            raise Stopped(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.deaf:
            return
        if number == signal.SIGINT:
            if self._interrupted:
                os.write(2, b"\ntrace_hydra: stopped at once; the next start goes on from the last checkpoint\n")
                os._exit(EXIT_AT_ONCE)
            self._interrupted = True
        self.requested = self.requested or signal.Signals(number).name  # the first is why; others come to hurry it
        if not self._held:
            raise Stopped(self.requested)
        print(f"\ntrace_hydra: {self.requested}: saving, then stopping (Ctrl-C: at once)", file=sys.stderr, flush=True)
