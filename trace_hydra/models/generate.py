"""Generation from ids."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from trace_hydra import ranks
from trace_hydra.models.decode import Plan, decode, greedy, sampler
from trace_hydra.models.precision import cast_once
from trace_hydra.models.slots import attends_to_all


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; the protocol's, never the model's own settings."""

    do_sample: bool
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Generated:
    """One answer."""

    text: str
    """Decoded new tokens without special tokens, stop strings not yet cut."""
    num_prompt: int
    num_new: int
    """Generated tokens, the end token included."""
    stopped: bool
    """Whether the answer ended by itself (end token or stop string), not by the limit."""


def generate(
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
    numbers: Sequence[int] | None = None,
) -> list[Generated]:
    """Generate an answer to each prompt, in the order given.

    Models whose layers all attend to every position go through `decode`, others batch by batch through transformers.
    The model's mode and the global random state are as before afterwards.

    Args:
        model: A causal LM, on its device.
        tokenizer: Decodes; gives the end token.
        prompts: Token ids, none empty.
        max_new_tokens: Limit, at least 1.
        decoding: Greedy or sampling.
        batch_tokens: Padded prompt and answer tokens of the rows under way; there is at least one.
        stop: Strings that end an answer.
        seed: Seeds sampling.
        on_batch: Called with (prompts, prompt and new tokens) as answers end.
        numbers: The number of each prompt among all that are asked, which its draws are seeded with; by default its
            place.
    """
    was_training = model.training
    model.eval()
    results: dict[int, Generated] = {}
    devices = [model.device] if model.device.type == "cuda" else []  # type: ignore[union-attr]
    numbers = numbers if numbers is not None else range(len(prompts))
    with torch.random.fork_rng(devices=devices), torch.inference_mode(), cast_once(model):
        torch.manual_seed(seed)
        if attends_to_all(model):
            answers = _by_slots(model, tokenizer, prompts, max_new_tokens, decoding, batch_tokens, stop, seed, numbers)
        else:
            answers = _by_batches(model, tokenizer, prompts, max_new_tokens, decoding, batch_tokens, stop)
        for index, tokens in answers:
            results[index] = finish(tokenizer, len(prompts[index]), tokens, end_ids(model, tokenizer), stop)
            if on_batch:
                on_batch(1, results[index].num_prompt + results[index].num_new)
    model.train(was_training)
    return [results[index] for index in range(len(prompts))]


def generate_shared(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    on_batch: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Generated]:
    """Generate as `generate` does, each process of the run a part; all of them call, and get all answers.

    What is sampled batch by batch depends on the batches, so every process generates all of that.
    """
    if ranks.size() == 1 or (decoding.do_sample and not attends_to_all(model)):
        return generate(model, tokenizer, prompts, decoding=decoding, on_batch=on_batch, **settings)

    def own(numbers: Sequence[int]) -> dict[int, Generated]:
        chosen = [prompts[number] for number in numbers]
        made = generate(
            model, tokenizer, chosen, decoding=decoding, on_batch=on_batch, numbers=list(numbers), **settings
        )
        return dict(zip(numbers, made, strict=True))

    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found = ranks.shared_out(order, own)
    if on_batch and (others := [found[number] for at, number in enumerate(order) if at % ranks.size() != ranks.rank()]):
        on_batch(len(others), sum(one.num_prompt + one.num_new for one in others))
    return [found[number] for number in range(len(prompts))]


def _by_slots(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    decoding: Decoding,
    batch_tokens: int,
    stop: Sequence[str],
    seed: int,
    numbers: Sequence[int],
) -> Iterator[tuple[int, list[int]]]:
    def draws(index: int) -> list[float]:
        if not decoding.do_sample:
            return []
        drawn = Random(f"{seed}-{numbers[index]}")  # the same whatever other prompts there are
        return [drawn.random() for _ in range(max_new_tokens)]

    plan = Plan(
        max_new_tokens=max_new_tokens,
        ends=frozenset(end_ids(model, tokenizer)),
        choose=sampler(decoding.temperature, decoding.top_p) if decoding.do_sample else greedy,
        numbers=draws,
        stopped=StopStrings(tokenizer, stop, 0).ends if stop else lambda _: False,
    )
    return decode(model, prompts, plan, batch_tokens)


def _by_batches(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    decoding: Decoding,
    batch_tokens: int,
    stop: Sequence[str],
) -> Iterator[tuple[int, list[int]]]:
    with _own_settings_hidden(model, tokenizer):
        for indices in length_batches([len(ids) for ids in prompts], max_new_tokens, batch_tokens):
            batch = [prompts[index] for index in indices]
            yield from zip(
                indices, _generate_batch(model, tokenizer, batch, max_new_tokens, decoding, stop), strict=True
            )


def length_batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Cut prompts, longest first, into batches whose padded size stays within `batch_tokens`."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        widest = lengths[batches[-1][0]] + max_new_tokens if batches else 0
        if batches and widest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """List the ids that end an answer: the tokenizer's end token and those of the model's generation config."""
    ids = {tokenizer.eos_token_id}
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update(declared if isinstance(declared, list) else [declared])
    return sorted(token for token in ids if token is not None)


def _generate_batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    decoding: Decoding,
    stop: Sequence[str],
) -> list[list[int]]:
    from transformers import GenerationConfig, StoppingCriteriaList

    ends = end_ids(model, tokenizer)
    longest = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), longest), ends[0], dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.do_sample:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], use_cache=True, **sampling
    )
    criteria = StoppingCriteriaList([StopStrings(tokenizer, stop, longest)] if stop else [])
    device: Any = model.device
    output = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, stopping_criteria=criteria
    )
    return output[:, longest:].tolist()


@contextmanager
def _own_settings_hidden(model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """Take the model's own generation settings away: transformers fills what we leave unset from them."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=end_ids(model, tokenizer))  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = before


def finish(tokenizer: Any, num_prompt: int, tokens: list[int], ends: list[int], stop: Sequence[str]) -> Generated:
    """Make an answer of new tokens; those behind the first end token do not count."""
    at_end = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if at_end is None else tokens[:at_end]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stopped = at_end is not None or any(string in text for string in stop)
    return Generated(text, num_prompt, len(kept) + (at_end is not None), stopped)


class StopStrings:
    """Ends a row when its decoded tail shows a stop string.

    The tail is as many tokens as the longest stop string has bytes, which no tokenisation of it can exceed by more
    than the token that completes it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], num_prompt: int):
        self.tokenizer = tokenizer
        self.stop = stop
        self.num_prompt = num_prompt
        self.tail = max(len(string.encode()) for string in stop) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: D102 (transformers calls it)
        done = [self.ends(row) for row in input_ids[:, self.num_prompt :].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def ends(self, new: Sequence[int]) -> bool:
        """Whether the tail of a row's new tokens shows a stop string."""
        text = self.tokenizer.decode(new[-self.tail :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.stop)
