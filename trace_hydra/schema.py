"""Typed nodes of the configuration. A wrong key or type in them is refused while Hydra composes."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import MISSING

from trace_hydra import entry


@dataclass
class Seed:
    """conf/seed: where randomness comes from."""

    train: int = MISSING
    """Initial weights made by us, dropout, order of batches."""
    data: int = MISSING
    """Row limits, generated tasks, memory samples, demonstrations, a random task order."""
    generation: int = MISSING
    """Sampled decoding, where the protocol samples."""


@dataclass
class Paths:
    """conf/paths: folders; none of them changes a number."""

    runs: str = MISSING
    """Run directories go here."""
    data: str | None = None
    """Folder of the TRACE release or of own tasks in its layout."""
    ability: str | None = None
    """Folder with rows of the general-ability sets; null: lm-evaluation-harness reads them from the Hub."""
    hhh: str | None = None
    """Folder with TRACE's prompts for judging, helpful/<Set>/test.json and harmless/<Set>/test.json."""
    store: str = MISSING
    """Cache for base weights made by us, and for what start models answered to capability sets."""


@dataclass
class Budget:
    """conf/budget: how much is trained."""

    name: str = MISSING
    epochs: dict[str, int] = field(default_factory=dict)
    """Passes by task name, so every order trains each task as meant."""
    default_epochs: int = MISSING
    """Passes over a task that `epochs` does not name."""
    batch_size: int = MISSING
    """Rows of one optimizer step on all devices together."""
    micro_batch_size: int = MISSING
    """Rows of one forward pass, the longest there are; of shorter ones as many as take no more memory."""
    lr_full: float = MISSING
    """Learning rate when all weights train."""
    lr_adapter: float = MISSING
    """Learning rate of adapters."""
    lr_prompt: float = MISSING
    """Learning rate of soft prompts."""


@dataclass
class Decoding:
    """How answers are generated."""

    do_sample: bool = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    max_new_tokens: int | None = None
    """Answer limit for all tasks; null: each task's own."""
    stop: bool = MISSING
    """Stop at, and cut before, the task's stop strings."""


@dataclass
class Protocol:
    """conf/protocol: how rows become tokens and outputs become scores. All of it is in the fingerprint."""

    name: str = MISSING
    scoring: str = MISSING
    """"official" or "corrected", see metrics/score.py."""
    prompt: str = MISSING
    """"raw": the row's prompt as it is; "chat": through the model's chat template."""
    truncation: str = MISSING
    """"middle": keeps instruction and end of the prompt; "left": TRACE's, cuts from the start."""
    special_tokens: str = MISSING
    """"text": a literal `<s>` in a row is text; "parse": it becomes the special token, as in TRACE's code."""
    splitter: str = MISSING
    """Rules that take the final answer out of predictions that hold reasoning: "ours" or "re_eval"."""
    closed_answers: str = "generate"
    """How tasks with a closed set of answers are answered: "generate", or "log_likelihood" (the likeliest option)."""
    max_prompt_tokens: int = MISSING
    max_answer_tokens: int = MISSING
    decoding: Decoding = field(default_factory=Decoding)


@dataclass
class Evaluation:
    """conf/evaluation: which cells of the matrix are scored, and how fast."""

    cells: str = MISSING
    """"seen", "all" or "diagonal_last"."""
    row0: bool = MISSING
    """Score all tasks before training (needed for FWT)."""
    next_task: bool = MISSING
    """Score each task just before its stage too (needed for FWT)."""
    batch_tokens: int = MISSING
    """Prompt and answer tokens of one generation batch, padding included."""
    bootstrap_samples: int = MISSING
    """Replicates behind the confidence intervals."""


@dataclass
class Trust:
    """What the configuration may import beyond the allowlist."""

    targets: list[str] = field(default_factory=list)
    """Prefixes of `_target_`, such as `my_package.`"""


@dataclass
class Cost:
    """conf/debug/cost: estimate the run instead of running it."""

    device_gb: float = MISSING
    """Memory of the device, in 10^9 bytes; what the estimate is judged by."""
    host_gb: float = MISSING
    """Memory of the machine."""


@dataclass
class Store:
    """conf/store: what stays of a run in `paths.store`; changes no number."""

    keep: str = MISSING
    """Whose weights stay once a stage is trained, scored and measured: "all", "last" (of the run), "adapters" (of
    stages that train a part of the weights), "none"."""
    reserve_gb: float = MISSING
    """Space to leave free on the store's file system, in 10^9 bytes; a run that would not is refused."""


@dataclass
class Checkpoint:
    """conf/checkpoint: how often a stage under way is saved; changes no number."""

    every_s: float | None = MISSING
    """Seconds between two; null: not by time."""
    every_steps: int | None = MISSING
    """Optimizer steps between two; null: not by steps."""
    share: float = MISSING
    """Most of the training time that saving by time may take, in (0, 1]; slow disks save less often."""


@dataclass
class Sweep:
    """How jobs of a sweep are treated; changes no number."""

    fail_fast: bool = False
    """Start no further job once one has failed; those that run go on."""


@dataclass
class Config:
    """The root. Nodes typed Any hold a `_target_` with keyword arguments, checked by `build.validate`."""

    seed: Seed = field(default_factory=Seed)
    paths: Paths = field(default_factory=Paths)
    budget: Budget = field(default_factory=Budget)
    protocol: Protocol = field(default_factory=Protocol)
    evaluation: Evaluation = field(default_factory=Evaluation)
    trust: Trust = field(default_factory=Trust)
    store: Store = field(default_factory=Store)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    sweep: Sweep = field(default_factory=Sweep)
    on_nonfinite: str = MISSING
    """What happens at a loss or gradient that is not finite: "stop", or "skip_batch" (no step is taken)."""
    on_oom: str = MISSING
    """What happens when memory runs out in training: "stop", or "halve" (the micro-batch; accumulation doubles)."""
    progress: str = "auto"
    """What is shown while it runs: "bar", "lines", "quiet"; "auto": a bar on a terminal, lines elsewhere."""
    model: Any = MISSING
    tuning: Any = MISSING
    optim: Any = MISSING
    method: Any = MISSING
    task_order: Any = MISSING
    data: Any = MISSING
    engine: Any = MISSING
    """What generates answers: the model in this process, or something faster that is handed its weights."""
    capability: Any = MISSING
    judge: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = MISSING
    logger: Any = MISSING
    cost: Cost | None = None
    """If set, the run is estimated and not made."""


def register() -> None:
    """Put the schema into Hydra's store as `base_config`, and take out launchers that conf/hydra/launcher redefines.

    Hydra would lay the schema of a plugin over a file of the same name, and warn; the files name theirs (`base_...`).
    """
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    Plugins.instance()  # loads the plugins, once
    launchers = store.repo.get("hydra", {}).get("launcher", {})
    for path in (entry.project_root() / "conf" / "hydra" / "launcher").glob("*.yaml"):
        launchers.pop(path.name, None)
