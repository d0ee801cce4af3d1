"""One request to an OpenAI-compatible endpoint, and what its failures mean."""

import contextlib
import email.utils
import json
import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trace_hydra.capability.replies import Conversation, Reply, num_tokens
from trace_hydra.credentials import variable_fault

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI_URL = "https://api.openai.com/v1"
INSTALL = "pip install 'trace-hydra[judge]'"
HIDDEN = "<api key>"
SHORTEST_SECRET = 8
"""Shorter values of the key variable are placeholders ("none", "EMPTY") and are not searched for in texts."""


class Fault(Exception):
    """A request that brought no reply.

    Args:
        kind: "retry": may work later; "lost": will not, for this conversation; "fatal": will not for any.
        message: Without the key.
        wait_s: What the endpoint asks to wait for, if it does.
        billed: Whether the tokens may have been paid for.
    """

    def __init__(self, kind: str, message: str, wait_s: float | None = None, billed: bool = False):
        super().__init__(message)
        self.kind, self.message, self.wait_s, self.billed = kind, message, wait_s, billed


class Endpoint:
    """Asks with the `openai` package, whose own retries are off.

    The package would not retry an unreadable reply and not spend waits on a budget, so `ChatClient` retries. The key is
    read from the environment when the connection is made and is kept nowhere else.

    Args:
        node: Config path, for messages.
        base_url: None: OpenAI's own.
        api_key_env: Name of the variable that holds the key; None: the endpoint wants none.
        temperature: None: not sent (some models take no temperature).
    """

    def __init__(
        self,
        *,
        node: str,
        base_url: str | None,
        model: str,
        api_key_env: str | None,
        temperature: float | None,
        max_tokens: int,
        timeout_s: float,
    ):
        self.node = node
        self.base_url = base_url or OPENAI_URL
        self.model = model
        self.api_key_env = api_key_env
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.timeout_s = timeout_s
        self._limit = "max_tokens"
        self._open: OpenAI | None = None

    def problems(self) -> list[str]:
        """List what is wrong with package, address and key; sends nothing."""
        import importlib.util

        found = []
        if importlib.util.find_spec("openai") is None:
            found.append(f"{self.node} needs the package openai: {INSTALL} (or {self.node}=local, {self.node}=none).")
        if not _is_plain(self.base_url):
            found.append(
                f"{self.node}.base_url={_without_secrets(self.base_url)} must be http(s)://host/path without user, "
                f"password or query; a key belongs in the variable that {self.node}.api_key_env names."
            )
        key = self._key()
        if self.api_key_env and (fault := variable_fault(self.api_key_env)):
            found.append(f"{self.node}.api_key_env {fault}. (Its value is not shown.)")
        elif self.api_key_env and not key:
            found.append(
                f"the environment variable {self.api_key_env} is not set; {self.node}.api_key_env says that it holds "
                f"the key of {self.node}.base_url (null: the endpoint needs none)."
            )
        elif not (key.isascii() and key.isprintable()):
            found.append(f"the environment variable {self.api_key_env} holds characters that no key has.")
        return found

    def close(self) -> None:
        """Close the connections; the next request opens them again."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def connect(self) -> None:
        """Read the key and prepare the client; done once, before threads share it."""
        if self._open is None:
            from openai import OpenAI

            for name in ("httpx", "httpx2"):  # one INFO line a request otherwise
                if logging.getLogger(name).level == logging.NOTSET:
                    logging.getLogger(name).setLevel(logging.WARNING)
            # Anything but an empty key is sent; without one, the package would look for OPENAI_API_KEY by itself.
            self._open = OpenAI(
                api_key=self._key() or "none", base_url=self.base_url, timeout=self.timeout_s, max_retries=0
            )

    def ask(self, messages: Conversation, max_tokens: int | None = None) -> Reply:
        """Send one request.

        Raises:
            Fault: If no reply came.
        """
        import openai

        client = self._open
        if client is None:
            raise Fault("fatal", "the endpoint is not connected.")
        sent: dict[str, Any] = {"model": self.model, "messages": [dict(message) for message in messages]}
        if self.temperature is not None:
            sent["temperature"] = self.temperature
        limit = self._limit
        try:
            create: Any = client.chat.completions.with_raw_response.create
            raw = create(**sent, **{limit: max_tokens or self.max_tokens})
            return self._reply(raw.text, messages)
        except openai.APIStatusError as error:
            if limit == "max_tokens" and error.status_code == 400 and "max_completion_tokens" in str(error):
                self._limit = "max_completion_tokens"  # OpenAI's newer models know the limit by this name only
                return self.ask(messages, max_tokens)
            raise self._status_fault(error) from None
        except openai.APITimeoutError:
            raise Fault("retry", f"no reply within {self.node}.timeout_s={self.timeout_s:g} s.", billed=True) from None
        except openai.APIConnectionError as error:
            reason = self._clean(str(error.__cause__ or error))
            raise Fault("retry", f"{self.node}.base_url={self.base_url} cannot be reached: {reason}.") from None
        except openai.OpenAIError as error:
            raise Fault("retry", f"the reply cannot be read: {self._clean(str(error))}.", billed=True) from None

    def _reply(self, body: str, messages: Conversation) -> Reply:
        """Read a completion; what misses the shape (an error in a reply of status 200, say) may come right later."""
        try:
            content = json.loads(body)
            message = content["choices"][0]["message"]
            text = message.get("content") or message.get("refusal") or ""
            if not isinstance(text, str):
                raise TypeError("content is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = self._clean(body[:200])
            problem = f"the reply is no chat completion ({type(error).__name__}): {shown!r}."
            raise Fault("retry", problem, billed=True) from None
        usage = content.get("usage")
        usage = usage if isinstance(usage, Mapping) else {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        guessed = [num_tokens(messages), num_tokens([{"content": text}])]
        num_in, num_out = (n if isinstance(n, int) and n >= 0 else g for n, g in zip(counts, guessed, strict=True))
        return Reply(self._clean(text, None), None, False, num_in, num_out)

    def _status_fault(self, error: Any) -> Fault:
        status = error.status_code
        # The package shows what lies under `error`; servers with a shape of their own say it elsewhere.
        named = isinstance(error.body, Mapping) and error.body.get("message")
        said = self._clean(str(named or error.response.text))
        if status in (401, 403):
            where = f"the key in {self.api_key_env}" if self.api_key_env else f"no key ({self.node}.api_key_env=null)"
            return Fault("fatal", f"{self.node}.base_url={self.base_url} refuses {where} ({status}): {said}")
        if status == 404:
            return Fault(
                "fatal",
                f"{self.node}.base_url={self.base_url} knows no {self.node}.model={self.model}, or has no chat "
                f"completions at this address (404): {said}",
            )
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            return Fault("fatal", f"{self.node}.base_url={self.base_url}: the account's quota is used up (429): {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            return Fault(
                "retry", f"{self.base_url} answers with {status}: {said}", _retry_after(error.response.headers)
            )
        return Fault("lost", f"{self.base_url} answers with {status} ({self.node}.model={self.model}): {said}")

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    def _clean(self, text: str, limit: int | None = 300) -> str:
        """Take the key out of what an endpoint said, and shorten it."""
        key = self._key()
        if len(key) >= SHORTEST_SECRET:
            text = text.replace(key, HIDDEN)
        return text if limit is None or len(text) <= limit else f"{text[:limit]}..."


def _is_plain(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    secret = parts.username or parts.password or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not secret


def _without_secrets(url: str) -> str:
    return "..." if "@" in url or "?" in url or "#" in url else url


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After, seconds or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None
