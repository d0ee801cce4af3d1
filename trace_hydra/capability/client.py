"""Asking a chat model behind an OpenAI-compatible endpoint many questions: cached, retried, paced, within a budget."""

import logging
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from trace_hydra.capability.endpoint import Endpoint, Fault
from trace_hydra.capability.replies import (
    Conversation,
    Estimate,
    OnReply,
    Reply,
    ReplyCache,
    ask_cached,
    estimated,
    num_tokens,
    usd_of,
)
from trace_hydra.errors import CapabilityError, problem_list

__all__ = ["ChatClient", "Conversation", "Estimate", "Reply"]

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 600.0
"""An endpoint that asks to wait longer (a daily quota) has lost the request."""
LOST_IN_A_ROW = 8
"""So many conversations lost one after another, all retries spent, and the endpoint counts as down."""
_JITTER = random.Random()
"""Of its own: nothing may draw from the random state that training uses."""


class ChatClient:
    """A judge or a teacher at an endpoint.

    Replies are kept in `cache` as they come, so whatever ends a run (a kill, the budget, a wrong key) costs no reply
    twice. The key is read from the environment when asking and is in no message, file or log.
    """

    def __init__(
        self,
        *,
        name: str,
        base_url: str | None,
        model: str,
        api_key_env: str | None,
        temperature: float | None,
        max_tokens: int,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        concurrency: int,
        requests_per_minute: float | None,
        max_usd: float | None,
        usd_per_million_input: float | None,
        usd_per_million_output: float | None,
        cache: str,
        node: str = "judge",
    ):
        """Keep the settings; reads, imports and asks nothing.

        Args:
            name: Stands in reports and messages.
            base_url: Such as http://127.0.0.1:8000/v1; null is OpenAI's own.
            model: As the endpoint names it.
            api_key_env: Environment variable that holds the key; null sends none.
            temperature: Null: the endpoint's default.
            max_tokens: Limit of a reply.
            timeout_s: Longest silence of the endpoint within a request.
            retries: Further tries after one that may work later (429, 5xx, time-out, connection, unreadable reply).
            backoff_s: Mean wait before the first of them; doubles each time. A Retry-After counts if it is longer.
            concurrency: Requests at a time.
            requests_per_minute: Most requests sent in a minute, retries counted; null: no limit.
            max_usd: Most to spend in this process, needs both prices; null: no limit.
            usd_per_million_input: Price of tokens sent.
            usd_per_million_output: Price of tokens received.
            cache: Folder of replies.
            node: Config path, for messages.
        """
        self.name = name
        self.model = model
        self.node = node
        self.max_tokens = max_tokens
        self.retries = retries
        self.backoff_s = backoff_s
        self.concurrency = concurrency
        self.prices = (usd_per_million_input, usd_per_million_output)
        self.endpoint = Endpoint(
            node=node,
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            temperature=temperature,
            max_tokens=max_tokens,
            timeout_s=timeout_s,
        )
        self.budget = Budget(max_usd)
        self.requests_per_minute = requests_per_minute
        self.cache = ReplyCache(cache, self.identity())
        self._reached = False

    def problems(self) -> list[str]:
        """List wrong settings; if there are none, send one short question and say what is wrong with the answer."""
        found = self._setting_problems() + self.endpoint.problems()
        if found or self._reached:
            return found
        try:
            self.endpoint.connect()
            # Few tokens, but not one: models that reason before they write may refuse a limit that small.
            self.endpoint.ask([{"role": "user", "content": "Say yes."}], min(self.max_tokens, 16))
        except Fault as fault:
            return [f"{self.node}={self.name}: {fault.message}"]
        finally:
            self.endpoint.close()
        self._reached = True
        return []

    def identity(self) -> dict[str, Any]:
        """Say what decides a reply; nothing about key, speed or cost."""
        parameters = {"temperature": self.endpoint.temperature, "max_tokens": self.max_tokens}
        return {"base_url": self.endpoint.base_url, "model": self.model, "parameters": parameters}

    def is_model(self, model: Any) -> bool:
        """Whether the endpoint's model seems to be the one given (same name or path, without its organisation)."""
        names = [getattr(model, "name", None), getattr(model, "path", None)]
        return _short(self.model) in {_short(str(name)) for name in names if name}

    def estimate(self, conversations: Sequence[Conversation], *, variant: int = 0) -> Estimate:
        """Say what `ask` would take; asks nothing."""
        requests = [self.cache.request(conversation, variant) for conversation in conversations]
        return estimated(requests, self.cache, self.max_tokens, self.prices)

    def ask(
        self, conversations: Sequence[Conversation], on_reply: OnReply | None = None, *, variant: int = 0
    ) -> list[Reply]:
        """Get a reply to each conversation, in order.

        Args:
            conversations: The same one twice is asked once.
            on_reply: Called with index and reply as replies come, in the calling thread.
            variant: Another number asks anew what has a reply (a teacher's second attempt).

        Raises:
            CapabilityError: If the endpoint refuses key or model, is down, or the budget is spent; replies that came
                before are in the cache.
        """
        return ask_cached(self.cache, conversations, variant, on_reply, self._ask_missing)

    def _ask_missing(self, requests: Sequence[dict[str, Any]], deliver: OnReply) -> None:
        if found := self._setting_problems() + self.endpoint.problems():
            raise CapabilityError(problem_list(found))
        session = _Session(self)
        self.endpoint.connect()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="ask")
        try:
            futures: dict[Future, int] = {pool.submit(session.ask, one): at for at, one in enumerate(requests)}
            for future in as_completed(futures):
                reply = future.result()
                if reply is not None:
                    deliver(futures[future], reply)
        finally:
            session.halted.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self.endpoint.close()
        if session.failure:
            raise CapabilityError(
                f"{session.failure} {session.num_answered} of {len(requests)} requests were answered before; their "
                f"replies are kept in {self.cache.folder}, and asking again goes on from there."
            )
        if session.num_lost:
            log.warning("%s: %d of %d replies were lost.", self.name, session.num_lost, len(requests))

    def _setting_problems(self) -> list[str]:
        node = self.node
        at_least = {
            "max_tokens": (self.max_tokens, 1),
            "concurrency": (self.concurrency, 1),
            "retries": (self.retries, 0),
        }
        found = [
            f"{node}.{key}={value} must be a whole number of at least {least}."
            for key, (value, least) in at_least.items()
            if isinstance(value, bool) or not isinstance(value, int) or value < least
        ]
        above = {"timeout_s": self.endpoint.timeout_s, "requests_per_minute": self.requests_per_minute}
        found += [
            f"{node}.{key}={value} must be above 0." for key, value in above.items() if value is not None and value <= 0
        ]
        from_zero = {
            "backoff_s": self.backoff_s,
            "max_usd": self.budget.limit,
            "usd_per_million_input": self.prices[0],
            "usd_per_million_output": self.prices[1],
        }
        found += [
            f"{node}.{key}={value} must not be negative." for key, value in from_zero.items() if value and value < 0
        ]
        if self.budget.limit is not None and None in self.prices:
            found.append(
                f"{node}.max_usd={self.budget.limit:g} needs {node}.usd_per_million_input and "
                f"{node}.usd_per_million_output, else nobody knows what was spent."
            )
        return found


class Budget:
    """Money spent and about to be spent; shared by threads."""

    def __init__(self, limit: float | None):
        self.limit = limit
        self.spent = 0.0
        self._reserved = 0.0
        self._changed = threading.Condition()

    def reserve(self, usd: float) -> bool:
        """Set money aside; waits while requests under way may leave some over. False: it would exceed the limit."""
        with self._changed:
            while self.limit is not None and self.spent + self._reserved + usd > self.limit:
                if self.spent + usd > self.limit or not self._reserved:
                    return False
                self._changed.wait()
            self._reserved += usd
            return True

    def settle(self, reserved: float, usd: float) -> None:
        """Replace what was set aside by what was spent."""
        with self._changed:
            self._reserved -= reserved
            if self._reserved < 1e-12:
                self._reserved = 0.0  # no dust of rounding that `reserve` would wait for
            self.spent += usd
            self._changed.notify_all()


class _Session:
    """One call of `ask`: what its threads share."""

    def __init__(self, client: ChatClient):
        self.client = client
        self.halted = threading.Event()
        self.failure: str | None = None
        self.num_answered = 0
        self.num_lost = 0
        self._lost_in_a_row = 0
        self._lock = threading.Lock()
        self._next = 0.0

    def ask(self, request: dict[str, Any]) -> Reply | None:
        """Get one reply into the cache, in a thread; None once the session is halted."""
        client = self.client
        for attempt in range(client.retries + 1):
            if not self._wait_turn():
                return None
            reserved = usd_of(num_tokens(request["messages"]), client.max_tokens, client.prices) or 0.0
            if not client.budget.reserve(reserved):
                return self._halt(
                    f"{client.node}.max_usd={client.budget.limit:g} would be exceeded: {client.budget.spent:.4f} USD "
                    f"are spent, the next request may take {reserved:.4f}."
                )
            spent = reserved  # unless known better: a time-out may have been billed
            try:
                reply = client.endpoint.ask(request["messages"])
                spent = usd_of(reply.input_tokens, reply.output_tokens, client.prices) or 0.0
            except Fault as fault:
                spent = spent if fault.billed else 0.0
                last = fault
            else:
                client.cache.put(request, reply)
                with self._lock:
                    self.num_answered += 1
                    self._lost_in_a_row = 0
                return reply
            finally:
                client.budget.settle(reserved, spent)
            if last.kind == "fatal":
                return self._halt(last.message)
            if last.kind == "lost" or attempt == client.retries or (last.wait_s or 0) > LONGEST_WAIT_S:
                return self._lose(last)
            self._back_off(attempt, last)
        return None

    def _wait_turn(self) -> bool:
        """Wait until the pace allows a request; False once halted."""
        pace = self.client.requests_per_minute
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            if pace:
                self._next = start + 60 / pace
        return not self.halted.wait(start - now)

    def _back_off(self, attempt: int, fault: Fault) -> None:
        """Wait before another try: exponentially, with jitter so that threads do not come back together."""
        wait = self.client.backoff_s * 2**attempt * _JITTER.uniform(0.5, 1.5)
        if fault.wait_s:
            wait = max(wait, fault.wait_s)
            with self._lock:  # the endpoint means all of us
                self._next = max(self._next, time.monotonic() + fault.wait_s)
        log.info("%s: %s Trying again in %.1f s.", self.client.name, fault.message, wait)
        self.halted.wait(wait)

    def _lose(self, fault: Fault) -> Reply:
        with self._lock:
            self.num_lost += 1
            self._lost_in_a_row = self._lost_in_a_row + 1 if fault.kind == "retry" else 0
            down = self._lost_in_a_row >= LOST_IN_A_ROW
        if down:
            self._halt(f"{LOST_IN_A_ROW} requests in a row were lost; the last: {fault.message}")
        return Reply(None, fault.message)

    def _halt(self, reason: str) -> None:
        with self._lock:
            self.failure = self.failure or reason
        self.halted.set()


def _short(name: str) -> str:
    """The last part of a name or path, its letters and digits only: Llama-2-7b-chat is llama2_7b_chat."""
    return "".join(letter for letter in name.rstrip("/").rsplit("/", 1)[-1].lower() if letter.isalnum())
