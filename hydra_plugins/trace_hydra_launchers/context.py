"""What a launcher's jobs are composed with, in processes of their own."""

from collections.abc import Sequence
from typing import Any

from hydra.types import HydraContext


class _Loader:
    """Composes as Hydra's own does, with the schemas as in the process that started the sweep.

    Hydra takes its state along to another process and then loads the plugins again, which puts back what
    `schema.register` took out.
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def load_sweep_config(self, master_config: Any, sweep_overrides: Sequence[str]) -> Any:
        from trace_hydra import schema

        schema.register()
        return self.loader.load_sweep_config(master_config, list(sweep_overrides))


def context_of_jobs(context: HydraContext) -> HydraContext:
    """Give a launcher's `setup` the context to keep for its jobs."""
    loader: Any = _Loader(context.config_loader)
    return HydraContext(config_loader=loader, callbacks=context.callbacks)
