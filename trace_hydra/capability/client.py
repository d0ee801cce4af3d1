"""Asking a chat model behind an OpenAI-compatible endpoint many questions: cached, retried, paced, within a budget."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trace_hydra.capability.asking import Session
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
        session = Session(
            self.name,
            retries=self.retries,
            backoff_s=self.backoff_s,
            requests_per_minute=self.requests_per_minute,
        )
        self.endpoint.connect()
        sends: list[Callable[[], Reply]] = [partial(self._send, request) for request in requests]
        try:
            session.ask_all(
                sends,
                self.concurrency,
                lambda at, one: deliver(at, Reply(None, one.message) if isinstance(one, Fault) else one),
            )
        finally:
            self.endpoint.close()
        if session.failure:
            raise CapabilityError(
                f"{session.failure} {session.num_answered} of {len(requests)} requests were answered before; their "
                f"replies are kept in {self.cache.folder}, and asking again goes on from there."
            )
        if session.num_lost:
            log.warning("%s: %d of %d replies were lost.", self.name, session.num_lost, len(requests))

    def _send(self, request: dict[str, Any]) -> Reply:
        """Get one reply into the cache, in a thread.

        Raises:
            Fault: If no reply came, or the budget does not allow the request.
        """
        reserved = usd_of(num_tokens(request["messages"]), self.max_tokens, self.prices) or 0.0
        if not self.budget.reserve(reserved):
            raise Fault(
                "fatal",
                f"{self.node}.max_usd={self.budget.limit:g} would be exceeded: {self.budget.spent:.4f} USD are spent, "
                f"the next request may take {reserved:.4f}.",
            )
        spent = reserved  # unless known better: a time-out may have been billed
        try:
            reply = self.endpoint.ask(request["messages"])
            spent = usd_of(reply.input_tokens, reply.output_tokens, self.prices) or 0.0
        except Fault as fault:
            spent = spent if fault.billed else 0.0
            raise
        finally:
            self.budget.settle(reserved, spent)
        self.cache.put(request, reply)
        return reply

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


def _short(name: str) -> str:
    """The last part of a name or path, its letters and digits only: Llama-2-7b-chat is llama2_7b_chat."""
    return "".join(letter for letter in name.rstrip("/").rsplit("/", 1)[-1].lower() if letter.isalnum())
