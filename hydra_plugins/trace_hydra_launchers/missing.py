"""What stands in for a launcher whose package is not installed."""

from importlib.util import find_spec
from typing import Any

from hydra.plugins.launcher import Launcher

EXTRAS = {
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "ray": "ray",
}
"""Package -> the extra that installs it."""


def installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return find_spec(package) is not None


class Missing(Launcher):
    """Ends the command with what to install."""

    def __init__(self, **params: Any):
        self.params = params

    def setup(self, **given: Any) -> None:
        """Print what is missing and exit with 2."""
        from trace_hydra import diagnose

        lacking = {package: extra for package, extra in EXTRAS.items() if not installed(package)}
        advice = ", ".join(f"pip install 'trace-hydra[{extra}]'" for extra in lacking.values())
        diagnose.fail(
            f"hydra/launcher: {', '.join(lacking)} not installed. Install what the launcher needs: {advice}", 2
        )

    def launch(self, job_overrides: Any, initial_job_idx: int) -> Any:
        """Never called."""
        raise NotImplementedError
