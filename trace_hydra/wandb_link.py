"""Starting and ending a W&B run in bounded time, whatever the server does.

wandb itself waits: `init` for its whole time limit where a server is down, `finish` for everything to be uploaded, and
the end of the process for both again. So the server is asked first, with a short limit, and at the end again; the data
is on disk in any case.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trace_hydra.callbacks.axes import STAGE, STEP, TOKENS
from trace_hydra.wandb_quiet import contained

log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Between writes of the run's file. A kill loses at most what was logged since the last; wandb's own value is 15 s."""
SHARE = 0.02
"""Of a run's time: what either wait at its end, for tables and then for all, may take for a server that is lost ..."""
PATIENCE_S = 3.0
"""... or this if it is more; several times FLUSH_S, so that everything is on disk then."""


def open_run(
    arguments: dict[str, Any],
    settings: Mapping[str, Any],
    mode: str,
    *,
    probe_timeout_s: float,
    held_back: bool,
    alone: bool,
) -> Any:
    """Try the wanted mode, then offline.

    Args:
        arguments: Of `wandb.init`.
        settings: Fields of `wandb.Settings`.
        mode: "auto", "online", "offline", "disabled".
        probe_timeout_s: Seconds the server has to answer a first question.
        held_back: An earlier part of the run is not uploaded yet. What follows has to wait for it: an upload of the
            earlier part would be put behind the later one.
        alone: No W&B run of this process is open.

    Returns:
        A wandb.Run, None if disabled or impossible.
    """
    with contained():
        try:
            wanted, reason = _resolve_mode(mode, settings, probe_timeout_s, held_back)
        except Exception as error:  # noqa: BLE001 - a broken netrc or settings file must not end a run
            wanted, reason = "offline", _named(error)
    if wanted == "disabled":
        return None
    for attempted in (wanted, "offline"):  # offline twice: the second time with a new service
        before = _run_folders(arguments["dir"])
        try:
            with contained():
                experiment = _init(arguments, {**settings, "mode": attempted})
        except Exception as error:  # noqa: BLE001 - wandb raises errors of all kinds, and none is worth a run
            reason = _named(error)
            if alone:
                with contained():
                    _end_service(1)  # it would refuse the id, which it holds to be in use, and wait when it ends
            _remove(_run_folders(arguments["dir"]) - before)
            continue
        if attempted == "online":
            log.info("W&B: %s", experiment.url)
        else:
            log.info("W&B: offline (%s)", reason)
        return experiment
    log.warning("W&B cannot start (%s). The run goes on without it.", reason)
    return None


def finish_run(
    experiment: Any,
    exit_code: int,
    *,
    patience_s: float,
    timeout_s: float,
    alone: bool,
    last: Callable[[], None] = lambda: None,
) -> bool:
    """End a run; returns whether the server has all of it.

    Args:
        experiment: A wandb.Run.
        exit_code: 0 for a finished run.
        patience_s: How long it may take where the server does not answer.
        timeout_s: How long it may take where the server does.
        alone: No other W&B run of this process is open, so wandb's service can be ended with this one.
        last: What is still to be logged, and may wait for the server as the end does; raises nothing.
    """

    def finish() -> None:
        last()
        experiment.finish(exit_code=exit_code)

    with contained():
        finishing = _Call(finish)
        try:
            problem = _await(finishing, experiment, patience_s, timeout_s)
        except Exception as error:  # noqa: BLE001 - as in open_run
            problem = _named(error)
        finally:
            if alone and (finishing.is_alive() or finishing.error is not None):
                # Else wandb waits for the server once more when the process ends; or its service is broken.
                _end_service(exit_code)
                finishing.join(PATIENCE_S)
    if problem:
        log.warning("W&B did not finish: %s.", problem)
    return not (experiment.offline or problem)


def patience(seconds: float) -> float:
    """Say how long either wait at the end of a run of so many seconds may take where the server does not answer."""
    return max(PATIENCE_S, SHARE * seconds)


def server_answers(experiment: Any) -> bool:
    """Ask the server of an online run."""
    return not _problem(experiment.settings, PATIENCE_S)


class _Call(threading.Thread):
    """A call that may never return, and what it raised."""

    def __init__(self, call: Callable[[], Any]):
        super().__init__(daemon=True, name="trace_hydra-wandb-finish")
        self.error: BaseException | None = None
        self._call = call
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self.error = error


def _await(finishing: _Call, experiment: Any, patience_s: float, timeout_s: float) -> str:
    """Wait while the server answers; returns why the end did not come, "" if it came."""
    started = answered = time.monotonic()
    # Wait a moment before asking: an end usually takes less.
    finishing.join(min(FLUSH_S, timeout_s))
    problem = ""
    while finishing.is_alive():
        now = time.monotonic()
        if now - started >= timeout_s:
            return problem or f"not everything was uploaded within {timeout_s:g} s"
        if not experiment.offline:
            problem = _problem(experiment.settings, min(PATIENCE_S, timeout_s))
            now = time.monotonic()
            if not problem:
                answered = now
            elif now - answered >= patience_s:
                return problem
        finishing.join(FLUSH_S)
    if finishing.error is not None:
        return _named(finishing.error)
    # wandb gives an upload up for good after some refusals, and then ends at once.
    return "" if experiment.offline else _given_up(experiment)


def _given_up(experiment: Any) -> str:
    """Read in wandb's own log whether it stopped uploading; "" if not."""
    try:
        text = Path(experiment.settings.log_internal).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"{experiment.settings.log_internal} is gone: {error.strerror}"
    return "the server refused data during the run" if _FATAL in text else ""


_FATAL = "filestream: fatal error"


def _end_service(exit_code: int) -> None:
    """End wandb's service process and forget it; the next run starts another."""
    import wandb
    from wandb.sdk import wandb_setup

    try:
        connection: Any = wandb_setup.singleton()._connection
        connection._proc._process.kill()
        wandb.teardown(exit_code)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it finds the service gone, which is the point
        log.debug("wandb.teardown: %s", _named(error))


def _resolve_mode(mode: str, changes: Mapping[str, Any], probe_timeout_s: float, held_back: bool) -> tuple[str, str]:
    """Decide the mode without asking anyone; with the reason for offline."""
    import wandb
    from wandb.sdk.lib import wbauth

    if mode in ("offline", "disabled"):
        return mode, f"logger.wandb.mode={mode}"
    # Environment and settings files; silent: what wandb says during a run would stand in the progress line.
    settings = wandb.setup(wandb.Settings(silent=True)).settings.model_copy()
    if mode == "auto" and settings.mode not in ("online", "run", "shared"):
        return settings.mode.replace("dryrun", "offline"), f"WANDB_MODE or wandb's settings say {settings.mode}"
    settings.update_from_dict(dict(changes))
    # `wandb.init` would ask on a terminal, so it only goes online with a key.
    found = wbauth.authenticate_session(
        host=settings.base_url, source="trace_hydra", prompt=False, update_session=False
    )
    if not found and not settings.api_key:
        return "offline", "no API key is configured"
    if held_back:
        return "offline", "an earlier part of this run is not uploaded yet"
    if found:
        wbauth.settings.set_auth_settings(settings, found)
    problem = _problem(settings, probe_timeout_s)
    return ("offline", problem) if problem else ("online", "")


def _problem(settings: Any, timeout_s: float) -> str:
    """Ask the server who we are, the way wandb itself would (proxies, certificates); "" if it says so in time."""
    from wandb.apis.public.service_api import ServiceApi
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    once = settings.model_copy()
    once.x_graphql_retry_max = 1  # after 2 s; 0 stands for wandb's own value, 20
    once.x_graphql_timeout_seconds = timeout_s
    started = time.monotonic()
    try:
        ServiceApi(once, timeout=timeout_s).authenticate()
    except WandbApiFailedError as error:
        if time.monotonic() - started >= timeout_s:
            return f"{settings.base_url} did not answer within {timeout_s:g} s"
        return f"{settings.base_url}: {_short(error)}"
    return ""


def _init(arguments: dict[str, Any], settings: dict[str, Any]) -> Any:
    import wandb

    experiment = wandb.init(**arguments, settings=wandb.Settings(**settings))
    for axis in (STEP, STAGE, TOKENS):
        experiment.define_metric(axis, hidden=True)
    experiment.define_metric("train/*", step_metric=TOKENS)
    for name in ("score/*", "matrix/*", "samples/*", "method/*", "capability/*", "progress/op", "progress/bwt"):
        experiment.define_metric(name, step_metric=STAGE)
    return experiment


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_short(error)}"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _run_folders(directory: str) -> set[Path]:
    return {path for path in Path(directory).glob("wandb/*run-*") if path.is_dir() and not path.is_symlink()}


def _remove(folders: Iterable[Path]) -> None:
    """Take away what a failed start left: a run folder without a run in it."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
