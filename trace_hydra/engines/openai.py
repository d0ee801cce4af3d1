"""The engine `openai`: a server behind an OpenAI-compatible endpoint, which is handed the weights in a folder."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from trace_hydra.capability.asking import Session
from trace_hydra.capability.endpoint import Completion, Endpoint, Fault
from trace_hydra.engines.base import ADAPTERS, TRAINS_TO_ANSWER, WEIGHTS, Needs, OneByOne, Settings
from trace_hydra.engines.handover import Folders
from trace_hydra.errors import EngineError, problem_list
from trace_hydra.models.generate import Decoding, Generated

log = logging.getLogger(__name__)

FORMS = ("ids", "text", "chat")
"""How prompts are sent: completions of token ids or of text, or chat completions."""


class OpenAIEngine(OneByOne):
    """Asks for completions.

    The model is written to a folder once for each state, adapters merged, and requests name that folder as their model,
    so the server must see the same file system and load what is asked for (`transformers serve` does). It computes in
    the type of the weights.

    Args:
        base_url: Such as http://127.0.0.1:8000/v1; None is OpenAI's own, for a fixed model only.
        model: A model the server has anyway; only untrained weights can then be asked. None: the run's own.
        prompts: One of `FORMS`. As text, the server makes the tokens; where they would be others, a warning says of how
            many prompts. With "chat" the server puts its template around each prompt.
        api_key_env: Environment variable that holds the key; None sends none.
        timeout_s: Longest silence within a request.
        retries: Further tries after a fault that may pass.
        backoff_s: Mean wait before the first of them; doubles each time.
        concurrency: Requests at a time.
        folder: The store, where the model is written for the server.
        keep: Whether that stays.
    """

    name = "openai"
    serves = frozenset({ADAPTERS, WEIGHTS})

    def __init__(
        self,
        *,
        base_url: str | None,
        model: str | None,
        prompts: str,
        api_key_env: str | None,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        concurrency: int,
        folder: str,
        keep: bool,
    ):
        self.model, self.prompts, self.api_key_env = model, prompts, api_key_env
        self.retries, self.backoff_s, self.concurrency = retries, backoff_s, concurrency
        self.given_url = base_url
        self.endpoint = Endpoint(
            node="engine",
            base_url=base_url,
            model=model or "",
            api_key_env=api_key_env,
            temperature=None,
            max_tokens=1,
            timeout_s=timeout_s,
            instead="engine=hf",
        )
        self.folders = Folders(folder, keep)

    def identity(self) -> dict[str, Any]:
        """Which server, which model of its, and how prompts are sent."""
        return {"name": self.name, "base_url": self.endpoint.base_url, "model": self.model, "prompts": self.prompts}

    def problems(self, needs: Needs) -> list[str]:
        """Also what is wrong with the settings; if nothing is, ask the server whether it is there and takes the key."""
        found = [*super().problems(needs), *self._setting_problems(needs), *self.endpoint.problems()]
        if found:
            return found
        try:
            self.endpoint.connect()
            self.endpoint.reach()
        except Fault as fault:
            return [fault.message]
        finally:
            self.endpoint.close()
        return []

    def _setting_problems(self, needs: Needs) -> list[str]:
        found = []
        if self.prompts not in FORMS:
            found.append(f"engine.prompts={self.prompts} is none of {', '.join(FORMS)}.")
        for key, value, least in (("retries", self.retries, 0), ("concurrency", self.concurrency, 1)):
            if value < least:
                found.append(f"engine.{key}={value} must be at least {least}.")
        for key, value in (("timeout_s", self.endpoint.timeout_s), ("backoff_s", self.backoff_s)):
            if value <= 0:
                found.append(f"engine.{key}={value} must be above 0.")
        if self.prompts == "chat" and needs.prompt == "chat":
            found.append(
                "engine.prompts=chat with protocol.prompt=chat: two chat templates would stand around each prompt. Set "
                "protocol.prompt=raw, or engine.prompts=text."
            )
        if self.model is None and self.given_url is None:
            found.append("engine.base_url=null: name the server, such as http://127.0.0.1:8000/v1, or engine.model.")
        if self.model is None and "@" in str(self.folders.root):
            found.append(f"engine.folder={self.folders.root}: a server reads what stands behind @ as a revision.")
        if self.model is not None and {WEIGHTS, ADAPTERS, TRAINS_TO_ANSWER} & set(needs.kinds):
            found.append(
                f"engine.model={self.model} is what the server has, and method={needs.method} trains: the server would "
                "not answer with the trained weights. Set engine.model=null, or take a method that trains nothing."
            )
        return found

    def at(self, state: Any) -> None:
        """Take the folder away as soon as the weights may be others."""
        if state is None or self.state is None or state.key != self.state.key:
            self.folders.close()
        super().at(state)

    def close(self) -> None:
        """Close connections and take the folder away."""
        self.endpoint.close()
        self.folders.close()

    def answer(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        ended: Callable[[int, Generated], None],
    ) -> None:
        """Answer prompts; `batch_tokens` is the server's business."""
        self.endpoint.model = self._served(model, tokenizer)
        forms = self._forms(tokenizer, prompts)
        shared: dict[str, Any] = {"max_tokens": settings.max_new_tokens, **_sampling(settings.decoding)}
        if settings.stop:
            shared["stop"] = list(settings.stop)

        def deliver(index: int, reply: Completion | Fault) -> None:
            if isinstance(reply, Fault):
                raise EngineError(f"prompt {index + 1} of {len(prompts)} got no answer: {reply.message}")
            ended(index, _generated(reply, tokenizer, len(prompts[index]), settings.stop))

        sends = [
            partial(self.endpoint.complete, form, chat=self.prompts == "chat", **shared, **settings.seed_of(index))
            for index, form in enumerate(forms)
        ]
        session = Session(self.name, retries=self.retries, backoff_s=self.backoff_s)
        if found := self.endpoint.problems():
            raise EngineError(problem_list(found))
        self.endpoint.connect()
        try:
            session.ask_all(sends, self.concurrency, deliver)
        finally:
            self.endpoint.close()
        if session.failure:
            had = f"{session.num_answered} of {len(prompts)} prompts were answered before."
            raise EngineError(f"{session.failure} {had}")

    def _served(self, model: nn.Module, tokenizer: Any) -> str:
        """Name the model for the server; writes it first if need be."""
        if self.model is None:
            return str(self.folders.model(self.state, model, tokenizer))
        if self.state is None or self.state.changed:
            raise EngineError(
                f"engine.model={self.model} is what the server has, and the run's weights are trained by now. Set "
                "engine.model=null."
            )
        return self.model

    def _forms(self, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """Bring prompts into the form that is sent."""
        if self.prompts == "ids":
            return [list(ids) for ids in prompts]
        if self.prompts == "chat":
            texts = [_text(tokenizer, ids, skip=True) for ids in prompts]
            return [[{"role": "user", "content": text}] for text in texts]
        found = [text_of(tokenizer, ids) for ids in prompts]
        if other := sum(not same for _, same in found):
            log.warning(
                "engine=openai: %d of %d prompts reach the server as other tokens than engine=hf would read, because "
                "their text does not give the same tokens again (prompts that were cut, or spell out special tokens).",
                other,
                len(prompts),
            )
        return [text for text, _ in found]


def text_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, bool]:
    """Find the text that a server tokenises to these ids, and say whether it does.

    A server's tokenizer adds what this one adds, so a leading token that is added anyway is left out of the text.
    """
    whole = _text(tokenizer, ids)
    for text in dict.fromkeys([whole, _text(tokenizer, ids[1:])]):
        if list(tokenizer(text)["input_ids"]) == list(ids):
            return text, True
    return whole, False


def _text(tokenizer: Any, ids: Sequence[int], skip: bool = False) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def _sampling(decoding: Decoding) -> dict[str, Any]:
    return (
        {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.do_sample else {"temperature": 0.0}
    )


def _generated(reply: Completion, tokenizer: Any, num_prompt: int, stop: Sequence[str]) -> Generated:
    num_new = reply.output_tokens
    if num_new is None:  # the endpoint does not count
        num_new = len(tokenizer(reply.text, add_special_tokens=False)["input_ids"])
    stopped = reply.finish != "length" or any(string in reply.text for string in stop)
    return Generated(reply.text, num_prompt, num_new, stopped)
