"""The model in memory as lm-evaluation-harness asks for it.

Ids, stop strings and limits are those of the harness's own class for a checkpoint on disk (`--model hf`), so both give
the same numbers; batches, soft prompts and adapters are the run's. Two things differ: a context too long for a scored
continuation loses one token more at its start (there the last token, which is not fed, may exceed the positions), and
special tokens are left out before a stop string is looked for.
"""

from collections.abc import Sequence
from typing import Any

from trace_hydra.capability.subject import Subject
from trace_hydra.errors import CapabilityError

DEFAULT_NEW_TOKENS = 256
"""What the harness's own class generates at most where a task does not say."""


def harness_model(subject: Subject, max_new_tokens: int | None) -> Any:
    """Build the harness's view of a model; needs lm_eval.

    Args:
        subject: Answers.
        max_new_tokens: Caps the limit of every task; None: the tasks' own.
    """
    from lm_eval.api.model import TemplateLM

    class SubjectLM(_Asked, TemplateLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

    return SubjectLM(subject, max_new_tokens)


class _Asked:
    """What `TemplateLM` leaves open."""

    def __init__(self, subject: Subject, max_new_tokens: int | None):
        super().__init__()
        self.subject = subject
        self.max_new_tokens = max_new_tokens
        self.cut: dict[str, int] = {}
        """Context -> tokens that had to be left out at its start."""

    @property
    def tokenizer(self) -> Any:
        return self.subject.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        return self.subject.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; the tokenizer's begin token is added unless the text spells it out."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write turns as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = []
        for (context, _continuation), ids, continuation in requests:
            if not continuation or len(continuation) >= self.max_length:
                raise CapabilityError(
                    f"capability: an option of {len(continuation)} tokens cannot be scored; the model has "
                    f"{self.max_length} positions. Choose a model with a longer context."
                )
            rows.append((self._fit(context, ids, len(continuation)), continuation))
        found = self.subject.log_likelihoods([pair[0] for pair, _, _ in requests], rows)
        return [(one.total, one.is_greedy) for one in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily, all requests of the same limit and stop strings together."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(index)
        answers: dict[int, str] = {}
        for (limit, stop), members in groups.items():
            contexts = [requests[index].args[0] for index in members]
            ids = [self._fit(context, self.tok_encode(context), limit) for context in contexts]
            made = self.subject.generate(contexts, limit, ids=ids, stop=stop)
            for index, one in zip(members, made, strict=True):
                answers[index] = _before(one.text, stop)
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not needed: no set asks for the likelihood of whole documents."""
        raise CapabilityError("capability: likelihoods of whole documents are not part of any set.")

    def _settings(self, asked: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """Read the limit and the stop strings of a request."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        settings: dict[str, Any] = {**normalize_gen_kwargs(asked, DEFAULT_NEW_TOKENS)}
        if settings["do_sample"] or settings["temperature"]:
            raise CapabilityError(f"capability: a task asks for sampling ({asked}); general ability is greedy.")
        end = self.tokenizer.decode(self.eot_token_id)
        limit = int(settings["max_gen_toks"])
        if self.max_new_tokens is not None:
            limit = min(limit, self.max_new_tokens)
        return limit, tuple(string for string in handle_stop_sequences(settings["until"], end) if string)

    def _fit(self, context: str, ids: list[int], room: int) -> list[int]:
        """Keep the end of a context, so that `room` tokens have a position behind it."""
        kept = self.max_length - room
        if kept < 1:
            raise CapabilityError(
                f"capability: {room} new tokens leave no room for a prompt; the model has {self.max_length} positions. "
                "Lower max_new_tokens of the set or choose a model with a longer context."
            )
        if len(ids) > kept:
            self.cut[context] = len(ids) - kept
        return ids[-kept:]


def _before(text: str, stop: Sequence[str]) -> str:
    """Cut an answer where the first of the stop strings begins."""
    return text[: min((place for string in stop if (place := text.find(string)) >= 0), default=len(text))]
