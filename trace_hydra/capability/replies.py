"""What a chat model answers, what asking would cost, and the folder that keeps answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_hydra.files import write_json
from trace_hydra.keys import digest

Conversation = Sequence[Mapping[str, str]]
"""Messages, each with `role` (system, user, assistant) and `content`."""

BYTES_A_TOKEN = 3
"""For estimates: English takes some four bytes a token and Chinese about three, so the estimate is rather too high."""
TOKENS_A_MESSAGE = 4
"""For estimates: role and separators of a message."""


@dataclass(frozen=True)
class Reply:
    """The answer to one conversation."""

    text: str | None
    """None: lost for good."""
    error: str | None = None
    """Why it was lost."""
    cached: bool = False
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Estimate:
    """What asking would take, retries not counted."""

    requests: int
    """Conversations that neither the cache nor an earlier one of the same words answers."""
    cached: int
    input_tokens: int
    """Of the requests, from the length of their text."""
    output_tokens_at_most: int
    usd: float | None
    """At most, if the judge writes to its limit each time; None: no prices given."""


OnReply = Callable[[int, Reply], None]
"""Called with an index and its reply."""


def num_tokens(conversation: Conversation) -> int:
    """Estimate the tokens of a conversation from its length."""
    sizes = [len(message["content"].encode("utf-8", "replace")) for message in conversation]
    return sum(-(-size // BYTES_A_TOKEN) + TOKENS_A_MESSAGE for size in sizes)


class ReplyCache:
    """One JSON file a reply, named by what decides it, written whole or not at all; no key, no price, no time in it.

    Args:
        folder: Made when the first reply arrives; several runs may share it.
        identity: What decides a reply beside the messages.
    """

    def __init__(self, folder: str, identity: Mapping[str, Any]):
        self.folder = Path(folder).expanduser()
        self.identity = dict(identity)

    def request(self, conversation: Conversation, variant: int) -> dict[str, Any]:
        """Describe a request; `variant` tells repeated questions of the same words apart."""
        messages = [{"role": one["role"], "content": _encodable(one["content"])} for one in conversation]
        return {**self.identity, "messages": messages, "variant": variant}

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """Read a reply; an entry that is damaged, or is of another request, counts as not there."""
        try:
            entry = json.loads(self._file(request).read_text(encoding="utf-8"))
            reply = entry["reply"]
            if digest(entry["request"], 64) != digest(request, 64) or not isinstance(reply["text"], str):
                return None
            return Reply(reply["text"], None, True, int(reply["input_tokens"]), int(reply["output_tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keep a reply.

        Raises:
            StoreError: If it cannot be written.
        """
        kept = {"text": reply.text, "input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens}
        write_json({"request": request, "reply": kept}, self._file(request))

    def _file(self, request: Mapping[str, Any]) -> Path:
        key = digest(request, 64)
        return self.folder / key[:2] / f"{key}.json"


def ask_cached(
    cache: ReplyCache,
    conversations: Sequence[Conversation],
    variant: int,
    on_reply: OnReply | None,
    ask_missing: Callable[[Sequence[dict[str, Any]], OnReply], None],
) -> list[Reply]:
    """Reply to each conversation in order, from the cache where it has a reply; equal ones are asked once.

    Args:
        cache: Read here; `ask_missing` writes to it.
        conversations: Any number.
        variant: See `ReplyCache.request`.
        on_reply: Hears of each conversation.
        ask_missing: Takes distinct requests and reports the reply to each by its place among them.
    """
    requests = [cache.request(conversation, variant) for conversation in conversations]
    places: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        places.setdefault(digest(request, 64), []).append(index)
    replies: dict[int, Reply] = {}

    def deliver(indices: Sequence[int], reply: Reply) -> None:
        for index in indices:
            replies[index] = reply
            if on_reply:
                on_reply(index, reply)

    missing: list[list[int]] = []
    for indices in places.values():
        reply = cache.get(requests[indices[0]])
        if reply is None:
            missing.append(indices)
        else:
            deliver(indices, reply)
    if missing:
        ask_missing([requests[indices[0]] for indices in missing], lambda at, one: deliver(missing[at], one))
    return [replies[index] for index in range(len(requests))]


def estimated(
    requests: Sequence[Mapping[str, Any]],
    cache: ReplyCache,
    max_tokens: int,
    prices: tuple[float | None, float | None] = (None, None),
) -> Estimate:
    """Say what asking would take; `prices` are USD for a million tokens of input and of output."""
    distinct = {digest(request, 64): request for request in requests}
    missing = [request for request in distinct.values() if cache.get(request) is None]
    found = len(requests) - len(missing)
    num_in = sum(num_tokens(request["messages"]) for request in missing)
    num_out = max_tokens * len(missing)
    return Estimate(len(missing), found, num_in, num_out, usd_of(num_in, num_out, prices))


def usd_of(input_tokens: int, output_tokens: int, prices: tuple[float | None, float | None]) -> float | None:
    """Price tokens; None without both prices."""
    if prices[0] is None or prices[1] is None:
        return None
    return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6


def _encodable(text: str) -> str:
    """Replace lone surrogates, which a row may hold and no request can carry."""
    return text.encode("utf-8", "replace").decode("utf-8")
