"""Many requests to one endpoint: several at a time, paced, retried, and given up together when the endpoint is down."""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from trace_hydra.capability.endpoint import Fault

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 600.0
"""An endpoint that asks to wait longer (a daily quota) has lost the request."""
LOST_IN_A_ROW = 8
"""So many requests lost one after another, all retries spent, and the endpoint counts as down."""
_JITTER = random.Random()
"""Of its own: nothing may draw from the random state that training uses."""


class Session:
    """What the threads of one batch of requests share.

    Args:
        name: Of the endpoint, for messages.
        retries: Further tries after a fault that may pass.
        backoff_s: Mean wait before the first of them; doubles each time. A Retry-After counts if it is longer.
        requests_per_minute: Most requests sent in a minute, retries counted; None: no limit.
    """

    def __init__(self, name: str, *, retries: int, backoff_s: float, requests_per_minute: float | None = None):
        self.name, self.retries, self.backoff_s, self.pace = name, retries, backoff_s, requests_per_minute
        self.halted = threading.Event()
        self.failure: str | None = None
        """Why nothing more is asked."""
        self.num_answered = 0
        self.num_lost = 0
        self._lost_in_a_row = 0
        self._lock = threading.Lock()
        self._next = 0.0

    def ask_all(
        self, sends: Sequence[Callable[[], Any]], concurrency: int, deliver: Callable[[int, Any], None]
    ) -> None:
        """Make all requests, `concurrency` at a time, and hand over index and reply (or `Fault`: lost) as they come.

        `deliver` is called in this thread; what it raises ends everything. After a failure the rest is not delivered.
        """
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="ask")
        try:
            futures: dict[Future, int] = {pool.submit(self.ask, send): at for at, send in enumerate(sends)}
            for future in as_completed(futures):
                reply = future.result()
                if reply is not None:
                    deliver(futures[future], reply)
        finally:
            self.halted.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def ask(self, send: Callable[[], Any]) -> Any:
        """Get one reply, in a thread; a `Fault` if it is lost, None once the session is halted."""
        for attempt in range(self.retries + 1):
            if not self._wait_turn():
                return None
            try:
                reply = send()
            except Fault as fault:
                last = fault
            else:
                with self._lock:
                    self.num_answered += 1
                    self._lost_in_a_row = 0
                return reply
            if last.kind == "fatal":
                return self._halt(last.message)
            if last.kind == "lost" or attempt == self.retries or (last.wait_s or 0) > LONGEST_WAIT_S:
                return self._lose(last)
            self._back_off(attempt, last)
        return None

    def _wait_turn(self) -> bool:
        """Wait until the pace allows a request; False once halted."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            if self.pace:
                self._next = start + 60 / self.pace
        return not self.halted.wait(start - now)

    def _back_off(self, attempt: int, fault: Fault) -> None:
        """Wait before another try: exponentially, with jitter so that threads do not come back together."""
        wait = self.backoff_s * 2**attempt * _JITTER.uniform(0.5, 1.5)
        if fault.wait_s:
            wait = max(wait, fault.wait_s)
            with self._lock:  # the endpoint means all of us
                self._next = max(self._next, time.monotonic() + fault.wait_s)
        log.info("%s: %s Trying again in %.1f s.", self.name, fault.message, wait)
        self.halted.wait(wait)

    def _lose(self, fault: Fault) -> Fault:
        with self._lock:
            self.num_lost += 1
            self._lost_in_a_row = self._lost_in_a_row + 1 if fault.kind == "retry" else 0
            down = self._lost_in_a_row >= LOST_IN_A_ROW
        if down:
            self._halt(f"{LOST_IN_A_ROW} requests in a row were lost; the last: {fault.message}")
        return fault

    def _halt(self, reason: str) -> None:
        with self._lock:
            self.failure = self.failure or reason
        self.halted.set()
