"""`python -m trace_hydra`: Hydra composes, `run.run` does the rest."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from trace_hydra import diagnose, entry, schema
from trace_hydra.errors import TraceHydraError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def compose_and_run() -> float | None:
    """Let Hydra compose and launch; returns OP to sweepers."""
    schema.register()
    entry.register_resolvers()

    @hydra.main(version_base="1.3", config_path=str(entry.project_root() / "conf"), config_name="config")
    def task(config: DictConfig) -> float | None:
        directory = Path(HydraConfig.get().runtime.output_dir)
        try:
            if config.cost is not None:
                from trace_hydra.cost import report  # these load torch; `--cfg job` must not

                return report(config, directory)
            from trace_hydra.run import run

            return run(config, directory)
        except TraceHydraError as error:
            diagnose.discard_empty(directory)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                # `sys.exit` in a job would end the whole sweep; the launcher goes on and exits 1 at the end.
                raise
            diagnose.fail(str(error), EXIT_ERROR)
        except KeyboardInterrupt:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            diagnose.fail("interrupted; results.json was not written", EXIT_INTERRUPTED)

    return task()


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 what a user can mend, 130 interrupted, 1 anything else."""
    sys.argv[1:] = entry.rewrite_overrides(sys.argv[1:])
    with diagnose.composition_errors(sys.argv[1:]):
        compose_and_run()


if __name__ == "__main__":
    main()
