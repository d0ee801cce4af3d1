"""What a run needs of its engine, from what method and tuning say of themselves."""

from trace_hydra.engines.base import ADAPTERS, BY_PROMPT, CHOICES, SOFT_PROMPTS, TRAINS_TO_ANSWER, WEIGHTS, Needs
from trace_hydra.methods.base import Method
from trace_hydra.models.tuning import Frozen, Lora, Tuning


def needs_of(method: Method, tuning: Tuning, *, num_stages: int, name: str, prompt: str, chooses: bool) -> Needs:
    """Put together what answers need.

    Args:
        method: Of the run.
        tuning: Of the run.
        num_stages: Tasks of the run.
        name: What the configuration calls the method.
        prompt: The protocol's, "raw" or "chat".
        chooses: Whether a task's answers are chosen among its options.
    """
    found = {
        SOFT_PROMPTS: method.prefix_length(tuning.prefix_length, num_stages) > 0,
        ADAPTERS: isinstance(tuning, Lora),
        WEIGHTS: not isinstance(tuning, Frozen),
        BY_PROMPT: method.picks_by_prompt,
        TRAINS_TO_ANSWER: method.grad_at_test,
        CHOICES: chooses,
    }
    return Needs(frozenset(kind for kind, needed in found.items() if needed), name, prompt)
