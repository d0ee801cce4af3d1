"""How sure a number is: intervals, differences between methods, and the smallest difference test sets can show.

docs/statistics.md says what each interval covers and how often it does.
"""

from trace_hydra.statistics.compare import Comparison, Difference, compare, corrected
from trace_hydra.statistics.contrasts import NUMBERS, delta_number, score_number
from trace_hydra.statistics.estimates import Estimate, across_runs, of_run
from trace_hydra.statistics.power import Smallest, smallest_difference
from trace_hydra.statistics.ranks import CriticalDifference, critical_difference
from trace_hydra.statistics.scores import ExampleScores, ItemDeltas, RunScores, read_scores

__all__ = [
    "NUMBERS",
    "Comparison",
    "CriticalDifference",
    "Difference",
    "Estimate",
    "ExampleScores",
    "ItemDeltas",
    "RunScores",
    "Smallest",
    "across_runs",
    "compare",
    "corrected",
    "critical_difference",
    "delta_number",
    "of_run",
    "read_scores",
    "score_number",
    "smallest_difference",
]
