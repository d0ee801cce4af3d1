"""A model under test without a run around it, and the settings of the six sets."""

from contextlib import nullcontext
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from trace_hydra.capability.subject import GREEDY, Subject
from trace_hydra.context import StageContext
from trace_hydra.data.encode import Encoder
from trace_hydra.methods.base import Method
from trace_hydra.models.tuning import Frozen, Tuning

SETS: dict[str, dict[str, Any]] = {
    "mmlu": {"shots": 5, "measure": "acc"},
    "gsm8k": {"shots": 8, "measure": "exact_match, flexible-extract"},
    "bbh": {"shots": 3, "measure": "exact_match, get-answer"},
    "tydiqa": {"shots": 0, "measure": "f1"},
    "boolq": {"shots": 0, "measure": "acc"},
    "piqa": {"shots": 0, "measure": "acc"},
}


def build(root, option: str, **changes: Any) -> Any:
    """Build what `model=<option>` with changes builds; `root` is the repository's."""
    config = OmegaConf.load(root / "conf" / "model" / f"{option}.yaml")
    return instantiate(OmegaConf.merge(config, changes), _convert_="all")


def subject_of(source: Any, tuning: Tuning | None = None) -> Subject:
    """The model of a source, nothing trained; with a tuning, what that adds to it."""
    tuning = tuning or Frozen()
    tokenizer, model = source.load_tokenizer(), tuning.apply(source.load())
    encoder = Encoder(
        tokenizer,
        prompt="raw",
        truncation="left",
        special_tokens="text",
        max_prompt_tokens=64,
        max_answer_tokens=8,
    )
    ctx = StageContext(
        model=model.eval(),
        tokenizer=tokenizer,
        encoder=encoder,
        tuning=tuning,
        device=torch.device("cpu"),
        decoding=GREEDY,
        batch_tokens=8192,
        instructions={},
        alignment=(),
        epochs_of=lambda task: 1,
        generation_seed=0,
        data_seed=0,
        autocast=nullcontext,
        total_stages=1,
        prefix=tuning.prefix(model),
    )
    return Subject(ctx, Method())


def random_tiny(root, std: float = 0.3, **changes: Any) -> Subject:
    """The tiny model with weights so large that its answers are long and its likelihoods far apart."""
    subject = subject_of(build(root, "tiny", **{"context_length": 16384, **changes}))
    generator = torch.Generator().manual_seed(0)
    for weight in subject.ctx.model.parameters():
        torch.nn.init.normal_(weight, std=std, generator=generator)
    return subject
