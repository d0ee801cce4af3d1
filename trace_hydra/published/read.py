"""Reading of `papers/*.yaml`, `matrices.json` and `subsets.csv`.

A paper's file holds what it printed and under which conditions: `groups` (rows of one group were made alike), `rows`
(OP and BWT), `abilities` (general ability), `judged` (win, tie, lose), `task_scores` (by task) and `doubts`. Every
scalar is read as the text it is, so that 45.70 keeps its digits and an unquoted value cannot change its type.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from trace_hydra.errors import DataError
from trace_hydra.published.records import FORMULAS, PARTS, Condition, Doubt, Entry, Group, Matrix, Paper, Row, condition

if TYPE_CHECKING:
    Loader = yaml.SafeLoader
else:
    Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both safe; the first is ten times faster

_SIGNS = {"negative": 1.0, "positive": -1.0, "doubtful": None}


def read_paper(text: str, name: str) -> Paper:
    """Read the text of a paper's file.

    Raises:
        DataError: If it is no such file; names the file, the place and what is wrong there.
    """
    try:
        node = yaml.load(text, Loader=_Texts)
    except yaml.YAMLError as error:
        raise DataError(f"{name} is no YAML: {error}") from error
    if not isinstance(node, dict):
        raise DataError(f"{name} must be a mapping that begins with `paper: NAME`.")
    try:
        return Paper.model_validate(node)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{name}: {place}: {first['msg']}, not {first['input']!r}.") from error


def entries_of(paper: Paper, groups: Mapping[str, Group], name: str) -> list[Entry]:
    """Give each row its group's conditions.

    Raises:
        DataError: If a row is wrong; names the file and its number from 1.
    """
    found = []
    for number, node in enumerate(paper.rows, 1):
        place = f"{name} row {number}"
        if not isinstance(node, dict):
            raise DataError(
                f"{place} must be a mapping {{group: ..., model: ..., method: ..., op: ...}}, not {node!r}."
            )
        own = {key: value for key, value in node.items() if key in PARTS}
        try:
            row = Row.model_validate({key: value for key, value in node.items() if key not in PARTS})
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
        if row.group not in groups:
            raise DataError(f"{place}: group {row.group!r} is none of {', '.join(sorted(groups))}.")
        if row.op is None and row.bwt is None:
            raise DataError(f"{place} has neither op nor bwt.")
        found.append(_entry(paper, groups[row.group], row, own, node, place))
    return found


def _entry(paper: Paper, group: Group, row: Row, own: Mapping[str, Any], node: Mapping[str, Any], place: str) -> Entry:
    stated = {part: condition(value) for part, value in {**group.conditions, **own}.items()}
    if wrong := set(stated) - set(PARTS):
        raise DataError(f"{place}: conditions {', '.join(sorted(wrong))} are none of {', '.join(PARTS)}.")
    if row.bwt is not None and any(name not in FORMULAS for _, name in stated.get("formula", Condition()).statements):
        raise DataError(f"{place}: formula {stated['formula']} is none of {', '.join(FORMULAS)}, unknown.")
    sign = _SIGNS[row.sign or group.sign]
    table = row.table or paper.table
    said = tuple(doubt.what for doubt in paper.doubts if _applies(doubt, table, row, stated))
    return Entry(
        paper=paper,
        group=row.group,
        table=table,
        model=row.model,
        method=row.method,
        family=row.family or row.method,
        op=row.op,
        op_std=row.op_std,
        bwt=row.bwt,
        bwt_std=row.bwt_std,
        bwt_signed=None if row.bwt is None or sign is None else sign * row.bwt + 0.0,
        sign_note=group.sign_note if row.bwt is not None else "",
        conditions=stated,
        copied_from=row.copied_from,
        matrix=row.matrix,
        note=row.note,
        doubts=said,
        printed={key: str(node[key]) for key in ("op", "op_std", "bwt", "bwt_std") if key in node},
    )


def _applies(doubt: Doubt, table: str, row: Row, stated: Mapping[str, Condition]) -> bool:
    if doubt.rows == "all":
        return True
    if row.matrix is not None and row.matrix in doubt.matrices:
        return True
    filters = [
        (doubt.tables, table),
        (doubt.methods, row.method),
        (doubt.data, stated.get("data", Condition()).value),
        (doubt.epochs, stated.get("epochs", Condition()).value),
    ]
    given = [(allowed, value) for allowed, value in filters if allowed]
    return bool(given) and all(value in allowed for allowed, value in given)


class _Texts(Loader):
    """Reads every scalar as text, and no key twice."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}  # noqa: RUF012 - yaml's own

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what YAML would take the last of."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


@cache
def papers() -> tuple[Paper, ...]:
    """Read every paper, TRACE first.

    Raises:
        DataError: If a file is wrong.
    """
    found = [
        read_paper(file.read_text(encoding="utf-8"), f"papers/{file.name}")
        for file in sorted((files("trace_hydra.published") / "papers").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    ]
    found = [_named(paper) for paper in found]
    return tuple(sorted(found, key=lambda paper: paper.paper != "TRACE"))


def _named(paper: Paper) -> Paper:
    lists = {
        key: tuple(one.model_copy(update={"paper": paper.paper}) for one in getattr(paper, key))
        for key in ("abilities", "judged", "task_scores")
    }
    groups = {
        name: group.model_copy(update={"name": name, "paper": paper.paper}) for name, group in paper.groups.items()
    }
    return paper.model_copy(update={**lists, "groups": groups})


@cache
def groups() -> dict[str, Group]:
    """Give every group by name."""
    return {name: group for paper in papers() for name, group in paper.groups.items()}


@cache
def matrices() -> tuple[Matrix, ...]:
    """Read TRACE's Tables 7-22 and 26."""
    content = json.loads((files("trace_hydra.published") / "matrices.json").read_text(encoding="utf-8"))
    return tuple(
        Matrix(
            table=one["table"],
            model=one["model"],
            method=one["method"],
            data=one["data"],
            order=str(one["order"]),
            tasks=tuple(one["tasks"]),
            cells=tuple(tuple(row) for row in one["cells"]),
            op=one["printed"]["op"],
            bwt=one["printed"]["bwt"],
        )
        for one in content["tables"]
    )


@cache
def subsets() -> tuple[dict[str, str], ...]:
    """Read TRACE's Tables 28-31: MMLU's subjects, BBH's subtasks, TyDiQA's languages and single sets of the 13B model.

    Returns:
        Rows of suite, subset, metric, and the scores 0-100 as printed of base, LoraSeqFT, SeqFT and Replay.
    """
    text = (files("trace_hydra.published") / "subsets.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(io.StringIO(text)))
