"""How things stand as lines for a terminal of any width, or for a file."""

import shlex
import time
from collections.abc import Iterator, Sequence

from trace_hydra.job import ERROR
from trace_hydra.status.model import STATES, Job, Status, Sweep
from trace_hydra.terminal import clock_time, cut, paint, plain

_LISTED = 40
"""Jobs up to which each has a line; of more, those that wait or are done go first."""
_COLOURS = {"running": "cyan", "failed": "red", "dead": "red", "interrupted": "yellow", "done": "green"}
_STACKED = 76
"""Columns below which a job's state goes under its name."""
_LABEL = 44
_BAR = 30
_QUIET_S = 300.0
"""Silence from which on it is said that a run gets nowhere."""
_COMMANDS = 3


def lines(status: Status, *, width: int | None, colour: bool, everything: bool = False) -> list[str]:
    """Write how everything stands.

    Args:
        status: As read.
        width: Columns of a terminal; None: lines of any length.
        colour: Whether states are coloured.
        everything: Whether each job has a line, however many there are.
    """
    found = [_first(status, width), *(plain(_sweep(sweep)) for sweep in status.sweeps if not sweep.finished)]
    found = [cut(line, width) if width else line for line in found]
    found.append("")
    shown = _chosen(status.jobs, everything)
    found += _jobs(shown, width, colour)
    if len(shown) < len(status.jobs):
        left_out = [job.state for job in status.jobs if job not in shown]
        counts = ", ".join(f"{left_out.count(state)} {state}" for state in STATES if state in left_out)
        found.append(f"... and {counts} (--all shows them)")
    if advice := list(_advice(status)):
        found += ["", *advice]
    return found


def _first(status: Status, width: int | None) -> str:
    """One line for all: a bar, counts, time left."""
    done, total = status.counts.get("done", 0), len(status.jobs)
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items()) or "no job"
    text = counts
    if status.open:
        left = status.left.seconds
        more = "".join(f" + {one}" for one in status.left.uncounted)
        text += f" · about {clock_time(left)}{more} left" if left is not None else " · time left not known yet"
        if left is None and status.left.note:
            text += f" ({status.left.note})"
    if total > 1 and (width is None or width >= len(text) + _BAR + 3):
        full = round(_BAR * done / total)
        text = f"[{'#' * full}{'-' * (_BAR - full)}] {text}"
    return plain(text)


def _sweep(sweep: Sweep) -> str:
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(sweep.started))
    how = {
        "running": f"running, process {sweep.pid} on {sweep.host}",
        "dead": f"its process ({sweep.pid} on {sweep.host}) is gone",
        "ended": f"ended with {sweep.code}",
    }[sweep.state]
    return f"sweep of {sweep.jobs} jobs since {since}: {how}"


def _chosen(jobs: Sequence[Job], everything: bool) -> list[Job]:
    ranked = sorted(jobs, key=lambda job: (STATES.index(job.state), job.number is None, job.number or 0, job.folder))
    return ranked if everything else ranked[:_LISTED]


def _jobs(jobs: Sequence[Job], width: int | None, colour: bool) -> list[str]:
    names = [" ".join(filter(None, [f"#{job.number}" if job.number is not None else "", job.label])) for job in jobs]
    names = [plain(name) for name in names]
    room = min(max(map(len, names), default=0), _LABEL if width else 10**6)
    if width and width >= 120:
        room = min(max(map(len, names), default=0), width // 2)
    found = []
    for job, name in zip(jobs, names, strict=True):
        state, details = job.state, [plain(one) for one in _details(job)]
        said = paint(state, _COLOURS.get(state), colour)
        if width is None or width >= _STACKED:
            head = f"{cut(name, room).ljust(room)}  "
            indent = " " * (len(head) + 2)
        else:
            found.append(cut(name, width))
            head, indent = "  ", "    "
        first = "  ".join(details[:1])
        space = (width or 10**6) - len(head) - len(state) - 2
        found.append(f"{head}{said}  {cut(first, space)}".rstrip())
        found += [indent + one for one in details[1:]]
    return found


def _details(job: Job) -> Iterator[str]:
    """Say what there is to a state; what must be read whole comes in lines of its own."""
    if job.state == "running":
        yield _place(job)
        if job.note:
            yield job.note
        elif job.quiet_s is not None and job.quiet_s > _QUIET_S:
            yield f"got no further for {clock_time(job.quiet_s)}"
    elif job.state == "failed":
        yield job.error
        yield f"{job.folder}/{ERROR}"
    elif job.state == "done":
        numbers = ((name, value) for name, value in (("OP", job.op), ("BWT", job.bwt)))
        yield "  ".join(f"{name} {value:.2f}" if value is not None else f"{name} not known" for name, value in numbers)
        if job.note:
            yield job.note
    else:
        place = _place(job) if job.state in ("dead", "interrupted") and job.doing else ""
        yield " · ".join(filter(None, [place, job.note]))


def _place(job: Job) -> str:
    """Say where a run is: stage, what it does there, share and time left."""
    if not job.doing:
        return "starting"
    parts = [f"stage {job.stage}/{job.stages}" if job.stage else f"before stage 1/{job.stages}"]
    what = {"training": "step", "answering": "answer"}.get(job.doing)
    detail = f" {job.task}".rstrip()
    if what:
        detail += f", {what} {job.done}/{job.planned}"
    elif job.doing == "measuring":
        detail += ", capability"
    parts[0] += detail
    if job.state == "running":
        more = "".join(f" + {one}" for one in job.uncounted)
        if job.percent is not None and not more:
            parts.append(f"{job.percent:.0f} %")
        parts.append("time left not known yet" if job.left_s is None else f"about {clock_time(job.left_s)}{more} left")
    return " · ".join(parts)


def _advice(status: Status) -> Iterator[str]:
    """Say what to type to go on with what has ended and is not done."""
    commands: list[tuple[str, Sequence[str]]] = []
    resumed = set()
    for sweep in status.sweeps:
        resumed.add(sweep.name)
        if not sweep.finished and sweep.state != "running":
            commands.append((sweep.directory, sweep.command))
    for job in status.jobs:
        if job.state in ("failed", "dead", "interrupted") and job.sweep not in resumed and job.arguments:
            commands.append((job.directory, job.arguments))
    commands = list(dict.fromkeys((folder, tuple(given)) for folder, given in commands))
    if commands:
        yield "To go on (what is done is skipped, what was begun is continued):"
    for folder, given in commands[:_COMMANDS]:
        where = f"cd {shlex.quote(folder)} && " if folder else ""
        yield plain(f"  {where}python -m trace_hydra {shlex.join(given)}")
    if len(commands) > _COMMANDS:
        yield f"  ... and {len(commands) - _COMMANDS} more commands (--json has them all)"
