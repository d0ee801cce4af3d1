"""One request to an OpenAI-compatible endpoint, and what its failures mean."""

import contextlib
import email.utils
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trace_hydra.capability.replies import Conversation, Reply, num_tokens
from trace_hydra.credentials import variable_fault

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
INSTALL = "pip install 'trace-hydra[judge]'"
HIDDEN = "<api key>"
SHORTEST_SECRET = 8
"""Shorter values of the key variable are placeholders ("none", "EMPTY") and are not searched for in texts."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind a prompt."""

    text: str
    finish: str | None
    """"stop", "length", or what the endpoint calls it."""
    input_tokens: int | None
    """As the endpoint counts; None: it does not say."""
    output_tokens: int | None


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
        instead: Settings that need no endpoint, for messages.
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
        instead: str = "judge=local, judge=none",
    ):
        self.node = node
        self.instead = instead
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
            found.append(f"{self.node} needs the package openai: {INSTALL} (or {self.instead}).")
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

    def reach(self) -> None:
        """Ask for the list of models, to see whether anybody is there and takes the key.

        Raises:
            Fault: If nobody is, or the key is refused; whatever else comes back is an answer.
        """
        import openai

        with self._faults():
            try:
                self._client().models.with_raw_response.list()
            except (openai.AuthenticationError, openai.PermissionDeniedError):
                raise
            except openai.APIStatusError as error:
                log.debug("%s has no list of models: %s", self.base_url, error.status_code)

    def ask(self, messages: Conversation, max_tokens: int | None = None) -> Reply:
        """Send one request.

        Raises:
            Fault: If no reply came.
        """
        import openai

        sent: dict[str, Any] = {"model": self.model, "messages": [dict(message) for message in messages]}
        if self.temperature is not None:
            sent["temperature"] = self.temperature
        limit = self._limit
        with self._faults():
            try:
                create: Any = self._client().chat.completions.with_raw_response.create
                raw = create(**sent, **{limit: max_tokens or self.max_tokens})
            except openai.BadRequestError as error:
                if limit == "max_tokens" and "max_completion_tokens" in str(error):
                    self._limit = "max_completion_tokens"  # OpenAI's newer models know the limit by this name only
                    return self.ask(messages, max_tokens)
                raise
            return self._reply(raw.text, messages)

    def complete(self, prompt: str | Sequence[int] | Conversation, *, chat: bool, **settings: Any) -> Completion:
        """Have the model go on behind a prompt.

        Args:
            prompt: Text or token ids; with `chat` a conversation.
            chat: Whether to ask for a chat completion.
            settings: `max_tokens`, `temperature`, `top_p`, `stop`, `seed`; sent as they are.

        Raises:
            Fault: If none came.
        """
        with self._faults():
            client = self._client()
            create: Any = (client.chat.completions if chat else client.completions).with_raw_response.create
            raw = create(model=self.model, **{"messages" if chat else "prompt": prompt}, **settings)
            return self._completion(raw.text, chat)

    def _client(self) -> "OpenAI":
        if self._open is None:
            raise Fault("fatal", "the endpoint is not connected.")
        return self._open

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Say in our words what the package raises."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            raise self._status_fault(error) from None
        except openai.APITimeoutError:
            raise Fault("retry", f"no reply within {self.node}.timeout_s={self.timeout_s:g} s.", billed=True) from None
        except openai.APIConnectionError as error:
            reason = self._clean(str(error.__cause__ or error))
            raise Fault("retry", f"{self.node}.base_url={self.base_url} cannot be reached: {reason}.") from None
        except openai.OpenAIError as error:
            raise Fault("retry", f"the reply cannot be read: {self._clean(str(error))}.", billed=True) from None

    def _completion(self, body: str, chat: bool) -> Completion:
        """Read a completion; half a one may come right later."""
        try:
            content = json.loads(body)
            choice = content["choices"][0]
            text = (choice["message"].get("content") or "") if chat else choice["text"]
            finish, usage = choice.get("finish_reason"), content.get("usage") or {}
            counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str):
                raise TypeError("the text is none")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = self._clean(body[:200])
            raise Fault(
                "retry", f"the reply is no completion ({type(error).__name__}): {shown!r}.", billed=True
            ) from None
        num_in, num_out = (count if isinstance(count, int) and count >= 0 else None for count in counts)
        return Completion(self._clean(text, None), finish, num_in, num_out)

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
                f"{self.node}.base_url={self.base_url} knows no {self.node}.model={self.model}, or has nothing "
                f"of this kind at this address (404): {said}",
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
