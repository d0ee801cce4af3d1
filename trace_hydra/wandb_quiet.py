"""Calls into wandb that leave stderr and the environment alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO


@contextmanager
def contained() -> Iterator[None]:
    """Keep wandb's messages off stderr, and put its environment variables (its service's address) back afterwards.

    Unless the environment says otherwise wandb reports errors to nobody: an offline run is to contact no one, and a
    report that gets no answer holds the end of the process up for 10 s (measured, wandb 0.31).
    """
    before = {key: value for key, value in os.environ.items() if key.startswith("WANDB")}
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with redirect_stderr(StringIO()):
        try:
            yield
        finally:
            for key in [key for key in os.environ if key.startswith("WANDB") and key not in before]:
                del os.environ[key]
            os.environ.update(before)
