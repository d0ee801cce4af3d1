"""Numbers that others printed for TRACE, with the protocol of each, and runs of ours beside them.

None of them was produced here. `papers/*.yaml` holds a file a source; adding a row is one line there, docs/published.md
says how. Rows of different groups were made differently and are never averaged, ranked or joined.
"""

from trace_hydra.published.beside import Comparison, Number, beside, bwt_by, entries, why_none
from trace_hydra.published.conditions import ORDERS, Part
from trace_hydra.published.read import groups, matrices, papers, subsets
from trace_hydra.published.records import FORMULAS, Ability, Entry, Group, Judged, Matrix, Paper, TaskScores

__all__ = [
    "FORMULAS",
    "ORDERS",
    "Ability",
    "Comparison",
    "Entry",
    "Group",
    "Judged",
    "Matrix",
    "Number",
    "Paper",
    "Part",
    "TaskScores",
    "abilities",
    "beside",
    "bwt_by",
    "entries",
    "groups",
    "judged",
    "matrices",
    "papers",
    "subsets",
    "task_scores",
    "why_none",
]


def abilities(model: str | None = None) -> list[Ability]:
    """List rows of general ability (TRACE's Table 2 and Figure 6, and what others printed), of one model or all."""
    return [one for paper in papers() for one in paper.abilities if model in (None, one.model)]


def judged(model: str | None = None) -> list[Judged]:
    """List judged shares (TRACE's Table 5 and Figure 2, OSF), of one model or all."""
    return [one for paper in papers() for one in paper.judged if model in (None, one.model)]


def task_scores(model: str | None = None) -> list[TaskScores]:
    """List scores by task, of one model or all.

    TRACE's Tables 6, 23-25 and 27, what others printed, and of each matrix its last column and its diagonal.
    """
    printed = [one for paper in papers() for one in paper.task_scores]
    derived = [one for matrix in matrices() for one in (matrix.last(), matrix.diagonal())]
    return [one for one in (*printed, *derived) if model in (None, one.model)]
