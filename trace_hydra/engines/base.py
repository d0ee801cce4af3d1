"""The interface of an engine: token ids in, answers out, by the weights of the run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from random import Random
from typing import Any

from torch import nn

from trace_hydra import ranks
from trace_hydra.models.generate import Decoding, Generated

SOFT_PROMPTS = "soft prompts (virtual token ids)"
ADAPTERS = "adapters"
WEIGHTS = "trained weights"
BY_PROMPT = "weights or soft prompts picked by each prompt"
TRAINS_TO_ANSWER = "training before each answer"
CHOICES = "log-likelihoods of options by the same model (protocol.closed_answers=log_likelihood)"
EVERYTHING = frozenset({SOFT_PROMPTS, ADAPTERS, WEIGHTS, BY_PROMPT, TRAINS_TO_ANSWER, CHOICES})
"""Kinds of what answers of a run may need."""


@dataclass(frozen=True)
class Needs:
    """What a run asks of its engine."""

    kinds: Collection[str]
    """Of `EVERYTHING`."""
    method: str
    """As the configuration calls it, for messages."""
    prompt: str = "raw"
    """"chat": prompts hold the model's chat template already."""


@dataclass(frozen=True)
class State:
    """Which weights a model has."""

    key: str
    """The same for the same weights, also in other processes."""
    changed: frozenset[str] = frozenset()
    """Names of the weights that are not the start model's."""


@dataclass(frozen=True)
class Settings:
    """How prompts are answered, as in `models.generate.generate`."""

    max_new_tokens: int
    decoding: Decoding
    batch_tokens: int
    stop: Sequence[str]
    seed: int

    def seed_of(self, index: int) -> dict[str, int]:
        """Give the argument that seeds the draws of the prompt at a place; none where nothing is drawn."""
        return {"seed": Random(f"{self.seed}-{index}").getrandbits(31)} if self.decoding.do_sample else {}


class Engine(ABC):
    """Generates. Log-likelihoods are no engine's part: the model in this process gives them.

    Constructors take keywords only, and read, import and ask nothing.
    """

    name: str
    serves: Collection[str] = EVERYTHING
    """What it can serve."""
    shared = False
    """Whether the processes of a run can answer together, each a part."""
    state: State | None = None
    """What weights the model has until further notice; None: they may change between any two calls."""

    def problems(self, needs: Needs) -> list[str]:
        """Say what is missing or cannot be served, before anything is loaded; may ask a server whether it is there."""
        if ranks.size() > 1 and not self.shared:
            return [f"engine={self.name} answers from one process; this run has {ranks.size()}. Use engine=hf."]
        lacking = [kind for kind in sorted(needs.kinds) if kind not in self.serves]
        if not lacking:
            return []
        return [
            f"engine={self.name} cannot serve method={needs.method}, whose answers need {' and '.join(lacking)}. Use "
            "engine=hf."
        ]

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Say what of the engine decides answers: name, versions, settings; nothing about speed, keys or places."""

    def at(self, state: State | None) -> None:
        """Hear which weights the model has from now on; None: nobody knows, it may be training."""
        self.state = state

    @abstractmethod
    def generate(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        decoding: Decoding,
        batch_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """Answer prompts in the order given; arguments as in `models.generate.generate`.

        Mode and weights of the model and the global random state are as before afterwards.

        Raises:
            EngineError: If an answer could not be had; there are no half results.
        """

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Give back what it holds; it can be used again."""


class OneByOne(Engine):
    """An engine that gives each answer as it ends, in any order."""

    def generate(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        decoding: Decoding,
        batch_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """Answer prompts in the order given."""
        answers: dict[int, Generated] = {}

        def ended(index: int, answer: Generated) -> None:
            answers[index] = answer
            if on_batch:
                on_batch(1, answer.num_prompt + answer.num_new)

        if prompts:
            settings = Settings(max_new_tokens, decoding, batch_tokens, stop, seed)
            self.answer(model, tokenizer, prompts, settings, ended)
        return [answers[index] for index in range(len(prompts))]

    @abstractmethod
    def answer(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        ended: Callable[[int, Generated], None],
    ) -> None:
        """Call `ended` with the place of each prompt and its answer; `prompts` is not empty. See `generate`."""


def package_version(name: str) -> str | None:
    """Look up a package's version; None: not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
