"""results.json as a page can use it: what is older, damaged or of another kind is left out and named."""

import math
from collections.abc import Mapping
from typing import Any

from trace_hydra.errors import DataError
from trace_hydra.metrics.continual import FORMULAS, ScoreMatrix
from trace_hydra.report.hostile import plain
from trace_hydra.report.results import SCHEMA

_KINDS: dict[str, type] = {
    **dict.fromkeys(("name", "model", "method", "tuning", "data", "task_order"), str),
    **dict.fromkeys(("seed", "protocol", "confidence", "capability", "published", "carried", "missing"), dict),
    **dict.fromkeys(("tokens", "truncated", "task_specs", "disclosures", "versions"), dict),
    **dict.fromkeys(("cells", "stages", "non_finite"), list),
}
_MAY_BE_NONE = {"confidence", "capability", "published"}


def fitted(results: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Leave out what is of another kind than a page expects, and say what.

    Raises:
        DataError: If `tasks` and `matrix` are no score matrix.
    """
    tasks = results.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise DataError("'tasks' is no list of names.")
    found = {**results, "matrix": ScoreMatrix(tasks, results.get("matrix")).rows}
    wrong = []
    for key, kind in _KINDS.items():
        value = found.get(key)
        if not isinstance(value, kind):
            if key not in found or (value is None and key in _MAY_BE_NONE):
                wrong += [key] if key not in found else []
            else:
                wrong.append(f"{key} ({type(value).__name__})")
            found[key] = "not known" if kind is str else kind()
    for key in (*FORMULAS, "wall_clock_s"):
        value = found.setdefault(key, None)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            wrong.append(f"{key} ({plain(value, 40)})")
            found[key] = None
    for key in ("cells", "stages"):
        kept = [one for one in found[key] if isinstance(one, Mapping)]
        wrong += [f"{len(found[key]) - len(kept)} of {key}"] if len(kept) < len(found[key]) else []
        found[key] = kept
    said = [f"results.json lacks, or has of another kind: {', '.join(wrong)}."] if wrong else []
    if (schema := found.get("schema")) != SCHEMA:
        said.append(f"results.json is of schema {plain(schema, 20)}; numbers are shown as those of schema {SCHEMA}.")
    return found, said
