"""Files of a finished run as W&B artifacts, where `logger.wandb.artifacts` asks for them."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trace_hydra.plan import RunInfo

log = logging.getLogger(__name__)

KINDS = ("results", "weights")
_RESULTS = ("results.json", "report.md", "report.html", "matrix.png", "audit.json", ".hydra/config.yaml")


def log_artifacts(experiment: Any, *, run: RunInfo, kinds: Sequence[str]) -> None:
    """Add an artifact a kind to a W&B run that is still open; what is not there is said and left out.

    Args:
        experiment: A wandb.Run.
        run: Its files are not copied: offline they have to stay until the run is uploaded.
        kinds: Of `KINDS`: `results` is what a reader needs of the run directory, `weights` the last stage as the store
            keeps it: what is not the start model's (adapters; with full tuning all weights) and the method's state.
    """
    import wandb

    for kind in kinds:
        files = dict(_results(run) if kind == "results" else _weights(run))
        if not files:
            continue
        metadata = {"run": run.name, "method": run.method, "model": run.model, "protocol": run.fingerprint}
        artifact = wandb.Artifact(f"{experiment.id}-{kind}", type=kind, metadata=metadata)
        for name, path in files.items():
            artifact.add_file(str(path), name=name, policy="immutable")
        experiment.log_artifact(artifact)


def _results(run: RunInfo) -> Iterator[tuple[str, Path]]:
    for name in _RESULTS:
        if (path := run.directory / name).is_file():
            yield name.removeprefix(".hydra/"), path


def _weights(run: RunInfo) -> Iterator[tuple[str, Path]]:
    stage = run.stages[-1]
    folder = Path(run.config["paths"]["store"]) / "stages" / stage.key
    if not (folder / "weights.safetensors").is_file():
        log.warning(
            "logger.wandb.artifacts: the weights of the last stage (%s) are not in the store; they are kept with "
            "store.keep=all, last or adapters.",
            stage.task,
        )
        return
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path.name, path
