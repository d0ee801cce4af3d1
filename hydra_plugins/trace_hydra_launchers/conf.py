"""The launchers' settings: the plugins' own schemas, with our launchers. Values are in conf/hydra/launcher."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from hydra_plugins.trace_hydra_launchers.missing import installed

_HERE = "hydra_plugins.trace_hydra_launchers"


def _store(name: str, node: Any) -> None:
    ConfigStore.instance().store(group="hydra/launcher", name=f"base_{name}", node=node, provider="trace_hydra")


if installed("hydra_plugins.hydra_submitit_launcher"):
    from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

    @dataclass
    class LocalConf(LocalQueueConf):
        """hydra/launcher=submitit_local."""

        _target_: str = f"{_HERE}.submitit_launcher.LocalLauncher"
        max_num_timeout: int = 0
        poll_s: float = 30.0

    @dataclass
    class SlurmConf(SlurmQueueConf):
        """hydra/launcher=submitit_slurm."""

        _target_: str = f"{_HERE}.submitit_launcher.SlurmLauncher"
        poll_s: float = 30.0

    _store("submitit_local", LocalConf)
    _store("submitit_slurm", SlurmConf)
else:
    _store("submitit_local", {"_target_": f"{_HERE}.missing.Missing"})
    _store("submitit_slurm", {"_target_": f"{_HERE}.missing.Missing"})

if installed("hydra_plugins.hydra_joblib_launcher"):
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

    @dataclass
    class JoblibConf(JobLibLauncherConf):
        """hydra/launcher=joblib."""

        _target_: str = f"{_HERE}.joblib_launcher.JoblibLauncher"

    _store("joblib", JoblibConf)
else:
    _store("joblib", {"_target_": f"{_HERE}.missing.Missing"})


@dataclass
class RayConf:
    """hydra/launcher=ray."""

    _target_: str = f"{_HERE}.ray_launcher.RayLauncher" if installed("ray") else f"{_HERE}.missing.Missing"
    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    max_retries: int = 0
    init: dict[str, Any] = field(default_factory=dict)


_store("ray", RayConf)
