"""A chat model in this process with the interface of `ChatClient`: a judge or a teacher without an endpoint."""

import gc
from collections.abc import Sequence
from typing import Any

from trace_hydra.capability.replies import Conversation, Estimate, OnReply, Reply, ReplyCache, ask_cached, estimated
from trace_hydra.errors import CapabilityError, TraceHydraError
from trace_hydra.keys import digest

_MARK = "\u2063{}\u2063"
"""Stands for a message while the chat template is laid around it; invisible separators, which no template has."""


class LocalChat:
    """Answers conversations with a causal LM, loaded for each call of `ask` and let go afterwards.

    Messages are tokenised apart from the chat template, so nothing that is written in them (a model's output may hold
    any text) passes for a special token. A conversation that does not fit the model's positions is lost, not cut.
    """

    def __init__(
        self,
        *,
        name: str,
        model: Any,
        temperature: float,
        max_tokens: int,
        batch_tokens: int,
        seed: int,
        device: str,
        cache: str,
        node: str = "judge",
    ):
        """Keep the settings; loads nothing.

        Args:
            name: Stands in reports and messages.
            model: An object of conf/model.
            temperature: 0 is greedy.
            max_tokens: Limit of a reply.
            batch_tokens: Padded prompt and reply tokens of a batch.
            seed: Of sampling; a reply then also depends on which others were in its batch.
            device: "auto" (CUDA if there is any), or as torch names it.
            cache: Folder of replies.
            node: Config path, for messages.
        """
        self.name = name
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.device = device
        self.node = node
        self._folder = cache
        self._cache: ReplyCache | None = None

    @property
    def cache(self) -> ReplyCache:
        """The folder of replies; opened late, because the model's identity may read its files."""
        if self._cache is None:
            self._cache = ReplyCache(self._folder, self.identity())
        return self._cache

    def problems(self) -> list[str]:
        """List wrong settings, and what the model says of itself; loads at most its tokenizer."""
        node = self.node
        found = [
            f"{node}.{key}={value} must be at least 1."
            for key, value in {"max_tokens": self.max_tokens, "batch_tokens": self.batch_tokens}.items()
            if value < 1
        ]
        if self.temperature < 0:
            found.append(f"{node}.temperature={self.temperature} must not be negative; 0 is greedy.")
        own = [f"{node}.model: {problem}" for problem in self.model.problems()]
        if not own:
            tokenizer = self.model.local_tokenizer()
            if tokenizer is not None and not getattr(tokenizer, "chat_template", None):
                own.append(f"{node}.model={self.model.name} has no chat template; take a chat model.")
        return found + own

    def identity(self) -> dict[str, Any]:
        """Say what decides a reply."""
        parameters: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.temperature > 0:
            parameters["seed"] = self.seed
        return {"base_url": None, "model": self.model.identity(), "parameters": parameters}

    def is_model(self, model: Any) -> bool:
        """Whether the judge is the model given."""
        return model.identity() == self.model.identity()

    def estimate(self, conversations: Sequence[Conversation], *, variant: int = 0) -> Estimate:
        """Say what `ask` would take, in tokens; it costs no money."""
        requests = [self.cache.request(conversation, variant) for conversation in conversations]
        return estimated(requests, self.cache, self.max_tokens)

    def ask(
        self, conversations: Sequence[Conversation], on_reply: OnReply | None = None, *, variant: int = 0
    ) -> list[Reply]:
        """Get a reply to each conversation, in order; arguments as in `ChatClient.ask`.

        Raises:
            CapabilityError: If the model cannot be loaded; replies that came before are in the cache.
        """
        return ask_cached(self.cache, conversations, variant, on_reply, self._ask_missing)

    def _ask_missing(self, requests: Sequence[dict[str, Any]], deliver: OnReply) -> None:
        import torch

        from trace_hydra.models.generate import Decoding, generate, length_batches

        model, tokenizer, positions = self._load()
        rows = [chat_ids(tokenizer, request["messages"]) for request in requests]
        fitting = [at for at, ids in enumerate(rows) if len(ids) + self.max_tokens <= positions]
        for at in sorted(set(range(len(rows))) - set(fitting)):
            problem = (
                f"{len(rows[at])} tokens and a reply of {self.node}.max_tokens={self.max_tokens} do not fit the "
                f"{positions} positions of {self.node}.model={self.model.name}."
            )
            deliver(at, Reply(None, problem))
        decoding = Decoding(self.temperature > 0, self.temperature or 1.0, 1.0)
        try:
            # A batch at a time, so that what is done is in the cache.
            for batch in length_batches([len(rows[at]) for at in fitting], self.max_tokens, self.batch_tokens):
                chosen = [fitting[place] for place in batch]
                made = generate(
                    model,
                    tokenizer,
                    [rows[at] for at in chosen],
                    max_new_tokens=self.max_tokens,
                    decoding=decoding,
                    batch_tokens=self.batch_tokens,
                    seed=int(digest([self.seed, [requests[at] for at in chosen]], 8), 16),
                )
                for at, one in zip(chosen, made, strict=True):
                    reply = Reply(one.text, None, False, one.num_prompt, one.num_new)
                    self.cache.put(requests[at], reply)
                    deliver(at, reply)
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _load(self) -> tuple[Any, Any, int]:
        """Load model and tokenizer; also how many positions there are."""
        import torch

        try:
            tokenizer, model = self.model.load_tokenizer(), self.model.load()
        except TraceHydraError as error:
            raise CapabilityError(f"{self.node}.model: {error}") from error
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = model.to(device)
        except RuntimeError as error:  # unknown name, no such device, no memory
            raise CapabilityError(f"{self.node}.device={self.device}: {error}") from error
        return model, tokenizer, int(model.config.get_text_config().max_position_embeddings)


def chat_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Lay the chat template around messages and tokenise, theirs as plain text.

    A template without a place for a system message gets it at the head of the user's first.

    Raises:
        CapabilityError: If the template cannot show the conversation.
    """
    from jinja2 import TemplateError

    for messages in (list(conversation), _without_system(conversation)):
        marked = [{"role": one["role"], "content": _MARK.format(at)} for at, one in enumerate(messages)]
        try:
            text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError):
            continue
        if all(text.count(one["content"]) == 1 for one in marked):
            return _joined_ids(tokenizer, text, [one["content"] for one in messages])
    raise CapabilityError("the judge's chat template cannot show a conversation of the roles system and user.")


def _joined_ids(tokenizer: Any, text: str, contents: Sequence[str]) -> list[int]:
    def encoded(part: str, is_text: bool) -> list[int]:
        return tokenizer(part, add_special_tokens=False, split_special_tokens=is_text)["input_ids"]

    ids: list[int] = []
    for at, content in enumerate(contents):
        frame, text = text.split(_MARK.format(at))
        ids += [*encoded(frame, False), *encoded(content, True)]
    return [*ids, *encoded(text, False)]


def _without_system(conversation: Conversation) -> list[dict[str, str]]:
    head = "\n\n".join(message["content"] for message in conversation if message["role"] == "system")
    rest = [dict(message) for message in conversation if message["role"] != "system"]
    if head and rest:
        rest[0]["content"] = f"{head}\n\n{rest[0]['content']}"
    return rest
