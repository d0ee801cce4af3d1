"""What a sweep says: its plan before the first job, and a closing table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from trace_hydra.job import ERROR, status
from trace_hydra.shown import print_table, say
from trace_hydra.sweep import JobPlan, Piece, read_results
from trace_hydra.terminal import plain

_LISTED = 30
"""Jobs up to which the plan has a line for each."""
EXIT_FAILED, EXIT_ERROR, EXIT_STOPPED = 1, 2, 75


@dataclass(frozen=True)
class Outcome:
    """How a job of a sweep ended."""

    plan: JobPlan
    state: str
    """done, done before, failed, stopped, running, not started, or same as another job."""
    op: float | None = None
    bwt: float | None = None


def show_plan(plans: Sequence[JobPlan], order: Sequence[JobPlan]) -> None:
    """Print what a sweep needs, what the store has of it, and what each job adds."""
    counts = [
        (sum(plan.done for plan in plans), "done before"),
        (len(order), "to run"),
        (sum(plan.problem is not None for plan in plans), "cannot run"),
        (sum(plan.same_as is not None for plan in plans), "the same as another"),
    ]
    said = ", ".join(f"{count} {what}" for count, what in counts if count)
    stages, cells = _distinct(plan.stages for plan in order), _distinct(plan.cells for plan in order)
    table = Table(title=f"sweep of {len(plans)} jobs: {said}", title_justify="left")
    for column in ("", "stages", "train tokens", "cells", "generations"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, wanted in (("needed", (True, False)), ("in the store", (True,)), ("new", (False,))):
        chosen = [[piece.amount for piece in pieces if piece.stored in wanted] for pieces in (stages, cells)]
        table.add_row(name, *(f"{number:,}" for amounts in chosen for number in (len(amounts), sum(amounts))))
    print_table(table)
    if len(plans) <= _LISTED:
        print_table(_job_table(plans, order))


def outcomes(plans: Sequence[JobPlan], halt: Path) -> list[Outcome]:
    """Find out how every job ended, from what it left in its folder."""
    return [_outcome(plan, halt) for plan in plans]


def show_outcomes(ended: Sequence[Outcome], folder: Path) -> None:
    """Print the closing table, where the tracebacks of failed jobs lie, and what to do next."""
    if not ended:
        return
    labels = label_jobs([one.plan for one in ended])
    table = Table(title="sweep", title_justify="left")
    for column in ("#", "job", "state", "OP", "BWT"):
        table.add_column(column, justify="left" if column in ("job", "state") else "right", overflow="fold")
    for one in ended:
        numbers = ("" if value is None else f"{value:.2f}" for value in (one.op, one.bwt))
        table.add_row(str(one.plan.number), plain(labels[one.plan.number]), one.state, *numbers)
    print_table(table)
    failed: dict[str, list[JobPlan]] = {}
    for one in ended:
        if one.state == "failed":
            failed.setdefault(_reason(one.plan), []).append(one.plan)
    for reason, plans in failed.items():
        numbers = ", ".join(f"#{plan.number}" for plan in plans)
        say("\n   ".join([f"{numbers} failed: {reason}", *(str(plan.directory / ERROR) for plan in plans)]))
    states = [one.state for one in ended]
    tally = {state: states.count(state) for state in dict.fromkeys(states) if not state.startswith("same")}
    say(", ".join(f"{count} {state}" for state, count in tally.items()))
    if exit_code(ended):
        say("The same command skips what is done and goes on with the rest.")
    say(f"One table of all runs: python -m trace_hydra.collect {folder}")


def exit_code(ended: Sequence[Outcome], stopped: bool = False) -> int:
    """Say how the sweep ends: 0 all done; 75 stopped; 1 a job failed; 2 no job could run.

    Args:
        ended: Of every job.
        stopped: Whether a signal ended the sweep; else a job whose process was killed counts after failed ones.
    """
    states = {one.state for one in ended if one.plan.same_as is None}
    if stopped:
        return EXIT_STOPPED
    if ended and all(one.plan.problem is not None for one in ended if one.plan.same_as is None):
        return EXIT_ERROR
    if "failed" in states:
        return EXIT_FAILED
    if "stopped" in states:
        return EXIT_STOPPED
    return 0 if states <= {"done", "done before"} else EXIT_FAILED


def label_jobs(plans: Sequence[JobPlan]) -> Mapping[int, str]:
    """Name each job by the overrides that not all of them share; the run's name if there is no such."""
    common = set.intersection(*(set(plan.overrides) for plan in plans)) if plans else set()
    own = {plan.number: " ".join(one for one in plan.overrides if one not in common) for plan in plans}
    return {plan.number: own[plan.number] or plan.directory.name for plan in plans}


def _job_table(plans: Sequence[JobPlan], order: Sequence[JobPlan]) -> Table:
    labels = label_jobs(plans)
    table = Table(box=None)
    for column in ("#", "job", "", "new stages", "train tokens", "new answers"):
        table.add_column(column, justify="left" if column in ("job", "") else "right", overflow="fold")
    for plan in [*order, *(plan for plan in plans if not plan.to_run)]:
        new = [[piece.amount for piece in pieces if not piece.stored] for pieces in (plan.stages, plan.cells)]
        numbers = [f"{number:,}" for number in (len(new[0]), sum(new[0]), sum(new[1]))] if plan.to_run else [""] * 3
        table.add_row(str(plan.number), plain(labels[plan.number]), _planned(plan), *numbers)
    return table


def _planned(plan: JobPlan) -> str:
    if plan.same_as is not None:
        return f"same as #{plan.same_as}"
    if plan.problem is not None:
        return "cannot run"
    if plan.done:
        return "done before"
    return "goes on" if any(piece.stored for piece in plan.stages) else "new"


def _outcome(plan: JobPlan, halt: Path) -> Outcome:
    if plan.same_as is not None:
        return Outcome(plan, f"same as #{plan.same_as}")
    state = "done before" if plan.done else "failed" if plan.problem else status(plan.directory, halt).get("state")
    if state not in ("done", "done before"):
        return Outcome(plan, state or "not started")
    results = read_results(plan.directory) or {}
    return Outcome(plan, state, results.get("op"), results.get("bwt"))


def _reason(plan: JobPlan) -> str:
    if plan.problem is not None:
        return plan.problem
    try:
        return (plan.directory / ERROR).read_text(encoding="utf-8").split("\n\ncommand:")[0]
    except OSError:
        return "no error.txt could be written"


def _distinct(groups: Iterable[Iterable[Piece]]) -> list[Piece]:
    return list({piece.key: piece for pieces in groups for piece in pieces}.values())
