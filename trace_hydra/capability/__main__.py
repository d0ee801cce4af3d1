"""Compare a run's stored answers again, with another judge or after a judge failed; no model is loaded.

    python -m trace_hydra.capability RUN_DIR [judge=openai judge.model=... judge.base_url=...]

What was judged before is taken from the judge's cache. results.json and report.md are written again. Exit codes: 0
done, 2 if an option, a file or the judge is wrong (the message goes to stderr).
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_hydra.credentials import argument_problems, secret_problems
from trace_hydra.errors import ConfigError, StoreError, TraceHydraError, problem_list
from trace_hydra.names import safe_name


def compare_again(run: Path, overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> dict[str, Any]:
    """Compare every set of every measured stage again.

    Args:
        run: Folder of a finished run.
        overrides: `judge=NAME` and `judge.KEY=VALUE`, for sets that have a judge; none: as the run was configured.
        trust: Prefixes of classes outside this package that the run's configuration may name.

    Returns:
        The new results.json.

    Raises:
        ConfigError: If an override, or what the run's own configuration names, is wrong.
        StoreError: If the run has no stored answers or cannot be written.
        CapabilityError: If a judge cannot be asked; nothing is written then, its replies so far are in its cache.
    """
    from trace_hydra.build import capability_sets
    from trace_hydra.capability import board
    from trace_hydra.capability.base import AREAS
    from trace_hydra.capability.board import pairs_file, read_records, records_file
    from trace_hydra.files import write_lines
    from trace_hydra.metrics.records import read_json
    from trace_hydra.report import results as report

    if secrets := argument_problems(overrides):
        raise ConfigError(problem_list(secrets))
    results = read_json(run / "results.json", StoreError)
    found = results.get("capability") if isinstance(results, Mapping) else None
    if not found or "config" not in found:
        raise StoreError(f"{run}/results.json holds no capability sets; the run was made with capability=none.")
    nodes, judge = _stored_sets(found, run), _judge(overrides)
    if judge is not None:
        nodes = {key: {**node, "judge": judge} if "judge" in node else node for key, node in nodes.items()}
    _check_targets(nodes, overrides, trust)
    problems: list[str] = []
    sets = capability_sets(nodes, problems)
    problems += [problem for one in sets.values() for problem in one.problems()]
    if problems:
        raise ConfigError(problem_list(problems))
    stages, written = {}, {}
    for row in [*(int(row) for row in found["stages"])]:
        pairs = []
        for key, one in sets.items():
            before, after = records_file(run, 0, key), records_file(run, row, key)
            if not after.is_file():
                continue  # the model was not measured there, only a run with its weights can
            own = board.compare(key, one, read_records(before), read_records(after))
            written[pairs_file(run, row, key)] = own
            pairs += own
        samples, seed = found["bootstrap"]["samples"], found["bootstrap"]["seed"]
        stages[str(row)] = board.summarise(sets, pairs, samples=samples, seed=seed)
    for path, own in written.items():
        write_lines(own, path)
    missing = {name: why for name, why in found["failed"].items() if not _stored(run, name)}
    kept = {key: value for key, value in found.items() if key not in (*AREAS, "sets")}  # an area may have no delta now
    again = {**kept, **stages[max(stages, key=int)], "stages": stages, "failed": missing}
    again |= {"fingerprint": board.fingerprint(sets), "config": {**found["config"], "sets": nodes}}
    results = {**results, "capability": again}
    report.write_results(results, run)
    return results


def _stored(run: Path, name: str) -> bool:
    from trace_hydra.capability.board import records_file

    row, _, key = name.partition("/")
    return records_file(run, int(row), key).is_file()


def _judge(overrides: Sequence[str]) -> dict[str, Any] | None:
    """Read conf/judge/NAME.yaml with overrides; None if there are none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from trace_hydra.entry import project_root, register_resolvers

    if not overrides:
        return None
    folder = project_root() / "conf" / "judge"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    first, *others = overrides
    key, _, name = first.partition("=")
    if key != "judge" or name not in names:
        raise ConfigError(f"{first}: the first override must be judge=NAME, one of {', '.join(names)}.")
    if bad := [one for one in others if not one.startswith("judge.") or "=" not in one]:
        raise ConfigError(f"{bad[0]}: only judge.KEY=VALUE can be set here.")
    register_resolvers()
    files = {"judge": folder / f"{name}.yaml", "paths": project_root() / "conf" / "paths" / "default.yaml"}
    config = OmegaConf.create({key: OmegaConf.load(path) for key, path in files.items()})
    OmegaConf.set_struct(config, True)  # refuses a key that the judge does not have
    try:
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(others))
        return OmegaConf.to_container(config.judge, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"judge={name}: {str(error).splitlines()[0]}") from error


def _stored_sets(found: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Take the sets of a results.json, which anyone may have written.

    Raises:
        StoreError: If its shape is another one, or a key or stage could lead out of the run directory.
    """
    config, place = found["config"], f"{run / 'results.json'}: capability"
    nodes = config.get("sets") if isinstance(config, Mapping) else None
    if not isinstance(nodes, dict) or not all(isinstance(node, dict) for node in nodes.values()):
        raise StoreError(f"{place}.config.sets must be a mapping of mappings.")
    for key, kind in (("bootstrap", dict), ("stages", dict), ("failed", dict)):
        if not isinstance(found.get(key), kind):
            raise StoreError(f"{place}.{key} must be a mapping.")
    if wrong := [row for row in found["stages"] if not re.fullmatch(r"[1-9][0-9]{0,5}", row)]:
        raise StoreError(f"{place}.stages: {wrong[0]!a} is no number of a stage.")
    if wrong := [name for name in found["failed"] if not re.fullmatch(r"[0-9]{1,6}/[^/]+", name)]:
        raise StoreError(f"{place}.failed: {wrong[0]!a} is no stage and set.")
    try:
        for key in nodes:
            safe_name(key, f"{place}.config.sets: a name")
    except ConfigError as error:
        raise StoreError(str(error)) from error
    return nodes


def _check_targets(nodes: Mapping[str, Any], overrides: Sequence[str], trust: Sequence[str]) -> None:
    """Refuse a results.json whose sets name what is not allowed, hold a secret, or would run code of a checkpoint."""
    from trace_hydra.guard import consent_problems
    from trace_hydra.targets import find_targets, target_problems, trust_problems

    at = "capability.sets"
    problems = secret_problems(nodes, at) or [*trust_problems(trust), *consent_problems(nodes, overrides, at)]
    if not problems:
        problems = [one for path, node in find_targets(nodes, at) for one in target_problems(path, node, trust)]
    if problems:
        raise ConfigError(problem_list(problems))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trace_hydra.capability", description="Compare a run's stored answers again."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("override", nargs="*", metavar="judge...=VALUE", help="judge=NAME, then judge.KEY=VALUE")
    parser.add_argument("--trust", action="append", default=[], metavar="my_package.", help="where own sets come from")
    options = parser.parse_args(arguments)
    try:
        results = compare_again(options.run, options.override, options.trust)
    except TraceHydraError as error:
        print(f"trace_hydra.capability: {error}", file=sys.stderr)
        return 2
    from trace_hydra.callbacks.capability import lines

    print("\n".join(lines(results["capability"])))
    if failed := results["capability"]["failed"]:
        print(f"still not measured: {', '.join(failed)}; that needs the trained model.")
    print(options.run / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
