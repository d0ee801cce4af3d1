"""Metrics in one CSV file that a run which goes on continues."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from trace_hydra.callbacks.axes import positions
from trace_hydra.files import write_bytes


class CsvFile(Logger):
    """One row for each call, a column for each metric ever logged, empty where a row lacks it.

    Every row is on disk when the call returns. What an earlier start of the run wrote stays, and is not written again;
    Lightning's CSVLogger deletes it. A line that a kill cut off is dropped.

    Args:
        path: The file; its folder is made with the first row.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self.logged: dict[str, float] = {}
        if path.is_file():
            self._take_up()

    @property
    def name(self) -> str:
        """Name the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one file a run."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing; the configuration lies in the run directory."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row.

        Raises:
            StoreError, OSError: If it cannot be written; what was there before is unchanged but for a cut-off line.
        """
        row = {**metrics, "step": step}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file() or set(row) - set(self._columns):
            rows = self._rows() if self.path.is_file() else []
            self._columns = sorted({*self._columns, *row})
            self._write([*rows, row])
            return
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        except OSError:
            # Half a line, on a full disk, would become one with the next.
            with self.path.open("r+b") as file:
                file.truncate(size)
            raise

    def finalize(self, status: str) -> None:
        """Do nothing; every row is on disk already."""

    def _take_up(self) -> None:
        """Read how far an earlier start came."""
        rows = self._rows()
        with self.path.open(newline="", encoding="utf-8") as file:
            self._columns = next(csv.reader(file), [])
        if self._columns and not self.path.read_bytes().endswith(b"\n"):
            self._write(rows)
        self.logged = positions({key: _number(value) for key, value in row.items() if value} for row in rows)

    def _rows(self) -> list[dict[str, Any]]:
        """Read the whole rows."""
        text = self.path.read_bytes().decode("utf-8", "replace")
        whole = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(io.StringIO(whole, newline="")))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(text.getvalue().encode(), self.path)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
