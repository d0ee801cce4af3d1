"""What is known about the TRACE release: its folders, row counts and file hashes.

Row counts and hashes were measured on a public copy of the release, except those in `SECOND_HAND`, which are
somebody else's counts. A folder that differs is not wrong, but its scores are not those of the named variant: the
variants have different test sets for several tasks. So differences are warnings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIANT_FOLDERS = {
    "trace5000": "LLM-CL-Benchmark_5000",
    "trace1000": "LLM-CL-Benchmark_1000",
    "trace500": "LLM-CL-Benchmark_500",
    "trace_reasoning": "LLM-CL-Benchmark_Reasoning",
}
"""Name of the data option -> folder in the release's archive."""

WITHOUT_EVAL = ("trace_reasoning",)
"""Variants whose eval.json may be absent: in the release it is the test file again for all tasks but C-STANCE."""

ALIGNMENT_FOLDER = "Lima"
"""Alignment rows for replay; its eval and test answers are all empty in the release."""

HOW_TO_GET = (
    "The data is TRACE-Benchmark.zip, linked (Google Drive) in the README of github.com/BeyonderXX/TRACE. Unpack it "
    "and run with data=trace5000 paths.data=FOLDER (or set TRACE_DATA); FOLDER holds LLM-CL-Benchmark_5000 or the "
    "task folders themselves. data=mini needs no files."
)

# train, eval, test
RELEASE_ROWS: dict[str, dict[str, tuple[int, int, int]]] = {
    "trace5000": {
        "C-STANCE": (5000, 2000, 2000),
        "FOMC": (5000, 496, 496),
        "MeetingBank": (5000, 687, 692),
        "Py150": (5000, 2000, 2000),
        "ScienceQA": (5000, 2000, 2000),
        "NumGLUE-cm": (5000, 41, 81),
        "NumGLUE-ds": (5000, 164, 325),
        "20Minuten": (5000, 200, 200),
        "Lima": (1030, 300, 300),
    },
    "trace1000": {
        "C-STANCE": (1000, 2000, 2000),
        "FOMC": (1000, 496, 496),
        "MeetingBank": (1000, 687, 692),
        "Py150": (1000, 2000, 2000),
        "ScienceQA": (1000, 2000, 2000),
        "NumGLUE-cm": (1000, 41, 81),
        "NumGLUE-ds": (1000, 164, 325),
        "20Minuten": (1000, 200, 200),
        "Lima": (1030, 300, 300),
    },
    "trace500": {
        "C-STANCE": (500, 100, 100),
        "FOMC": (500, 100, 100),
        "MeetingBank": (500, 100, 100),
        "Py150": (500, 100, 100),
        "ScienceQA": (500, 100, 100),
        "NumGLUE-cm": (500, 41, 81),
        "NumGLUE-ds": (500, 100, 100),
        "20Minuten": (500, 100, 100),
        "Lima": (1030, 300, 300),
    },
    "trace_reasoning": {
        "C-STANCE": (500, 500, 500),
        "FOMC": (500, 496, 496),
        "MeetingBank": (376, 235, 235),
        "Py150": (513, 500, 500),
        "ScienceQA": (440, 500, 500),
        "NumGLUE-cm": (500, 81, 81),
        "NumGLUE-ds": (500, 325, 325),
        "20Minuten": (401, 200, 200),
    },
}

RELEASE_CHARACTERS: dict[str, tuple[int, int, int, int]] = {
    "C-STANCE": (153, 269, 1, 1),
    "FOMC": (312, 1385, 1, 1),
    "MeetingBank": (5647, 373826, 338, 1100),
    "Py150": (663, 162477, 32, 256),
    "ScienceQA": (275, 1195, 805, 3690),
    "NumGLUE-cm": (193, 474, 2, 18),
    "NumGLUE-ds": (138, 282, 2, 5),
    "20Minuten": (2220, 10418, 261, 910),
}
"""Characters of train rows of trace5000: prompt median and longest, answer median and longest.

Measured on a public copy of the release for C-STANCE, FOMC and NumGLUE; somebody else's counts for the others."""

RELEASE_TOKENS: dict[str, int] = {
    "C-STANCE": 224,
    "FOMC": 93,
    "MeetingBank": 1191,
    "Py150": 504,
    "ScienceQA": 340,
    "NumGLUE-cm": 56,
    "NumGLUE-ds": 44,
    "20Minuten": 786,
}
"""Mean tokens of an encoded train row, LLaMA-2's tokenizer, cut at 1536, to two digits.

Measured on all rows of trace5000 for C-STANCE, FOMC and NumGLUE, of trace1000 for Py150, ScienceQA and 20Minuten, and
on 100 rows of trace500 for MeetingBank."""

SECOND_HAND = {
    ("trace5000", "MeetingBank", "train"),
    ("trace5000", "MeetingBank", "eval"),
    ("trace5000", "MeetingBank", "test"),
    ("trace5000", "Py150", "train"),
    ("trace5000", "Py150", "eval"),
    ("trace5000", "Py150", "test"),
    ("trace5000", "ScienceQA", "train"),
    ("trace5000", "20Minuten", "train"),
    ("trace1000", "MeetingBank", "train"),
    ("trace1000", "MeetingBank", "eval"),
    ("trace1000", "MeetingBank", "test"),
    ("trace1000", "Py150", "eval"),
    ("trace1000", "Py150", "test"),
    ("trace500", "MeetingBank", "train"),
}

# sha256, first 16 hex digits: train, eval, test; "" where no hash is on record.
RELEASE_HASHES: dict[str, dict[str, tuple[str, str, str]]] = {
    "trace5000": {
        "C-STANCE": ("a67441f42a1c6e34", "713a0ff3d81bcbbc", "fdb99faa91678559"),
        "FOMC": ("0b27cfac6d0f209a", "6a75f0b0518a106b", "7ce91cee6dc164a2"),
        "NumGLUE-cm": ("cc14f25cd7b768ef", "a6141669d310a778", "a0a6c1e4a2f59b0a"),
        "NumGLUE-ds": ("1d3fe0a38267fa3c", "410858278a08f64c", "7aad65a5ea6cb3ee"),
        "ScienceQA": ("", "39ff5218ecf1a133", "e0bcebb1c2c0782e"),
        "20Minuten": ("", "1b22612cf2c4316d", "a7c617d5c332df37"),
        "Lima": ("892161c8d2a39233", "e07f363a21a8bcd4", "e07f363a21a8bcd4"),
    },
    "trace1000": {
        "C-STANCE": ("bd42386a09f33f4d", "", "dd604b5654964124"),
        "FOMC": ("3e107d8034bc23b6", "", "bbf1b47bf64731e8"),
        "NumGLUE-cm": ("fffdc5f516890a52", "", "d510a2afc8d9d41f"),
        "NumGLUE-ds": ("f227653b96f9633a", "", "d977330905106273"),
        "ScienceQA": ("a589e512d4dfbc09", "", "04c262a49396d911"),
        "20Minuten": ("d9b4936e898d5f37", "", "2541e4972b8b3927"),
        "Py150": ("bca2e3a4f213f424", "", ""),
    },
    "trace500": {
        "C-STANCE": ("646ccbb96141b50f", "", "fb29ad754a99f811"),
        "FOMC": ("ad55548875b28afb", "", "8b257fcda84600ce"),
        "MeetingBank": ("", "", "11715340354cecc0"),
        "Py150": ("8a5439ee66d957f9", "", "418a4767caad60dd"),
        "ScienceQA": ("8f796547542ffdf8", "", "ed1314220ee5f370"),
        "NumGLUE-cm": ("722bbb05819949ff", "", "52a3fd70e1499530"),
        "NumGLUE-ds": ("4eaff949885eef27", "", "8d74f9d2406df790"),
        "20Minuten": ("f83be5bd734942d5", "", "c9ec851c744e3ae8"),
    },
    "trace_reasoning": {
        "C-STANCE": ("f6132413ada4df2d", "", "325f392d97295d22"),
        "FOMC": ("cf81d188c5b67b5b", "", "b9ccec04f0a4a914"),
        "MeetingBank": ("8554837e0255573d", "", "c9998ad7e4be75fe"),
        "Py150": ("045269cee98c2c70", "", "83b419a5085514cc"),
        "ScienceQA": ("3139745cf0de11ba", "", "6235dbf73c25909b"),
        "NumGLUE-cm": ("4dbff9c2d4f950d1", "", "0016e6d925bfb257"),
        "NumGLUE-ds": ("b170ab3301c57e62", "", "1f8f7610f65f3df2"),
        "20Minuten": ("ae5da10b0235c850", "", "56ef73137901ef63"),
    },
}

_SPLITS = ("train", "eval", "test")


def variant_folder(root: Path, variant: str | None) -> Path:
    """Find where the task folders of `variant` are: the archive's folder below `root`, else `root` itself."""
    if name := VARIANT_FOLDERS.get(variant or ""):
        for parent in (root, root / "TRACE-Benchmark"):
            if (parent / name).is_dir():
                return parent / name
    return root


def variants_in(root: Path) -> list[str]:
    """List the data options whose archive folder is below `root`."""
    return [variant for variant in VARIANT_FOLDERS if variant_folder(root, variant) != root]


def known_files(sha256: str) -> list[str]:
    """Name the release's files with this hash (full or its first 16 digits), as `<variant>/<task>/<split>.json`."""
    return [
        f"{variant}/{task}/{split}.json"
        for variant, tasks in RELEASE_HASHES.items()
        for task, hashes in tasks.items()
        for split, known in zip(_SPLITS, hashes, strict=True)
        if known and known == sha256[:16]
    ]


def release_warnings(variant: str | None, task: str, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say where a task's files differ from the release's.

    Args:
        variant: Data option that names what is expected; nothing is expected for None or an unknown name.
        task: Name of the task's folder.
        files: split -> {"rows": rows in the file, "sha256": ...}; absent splits are skipped.
    """
    rows = RELEASE_ROWS.get(variant or "", {}).get(task)
    if rows is None:
        return []
    warnings = []
    hashes = RELEASE_HASHES[str(variant)].get(task, ("", "", ""))
    for split, expected, known in zip(_SPLITS, rows, hashes, strict=True):
        if split not in files or not files[split].get("sha256"):
            continue
        found = files[split]
        source = " (a second-hand count)" if (variant, task, split) in SECOND_HAND else ""
        if found["rows"] != expected:
            warnings.append(f"{task}/{split}.json has {found['rows']} rows; {variant} has {expected}{source}.")
        elif known and found["sha256"][:16] != known:
            warnings.append(
                f"{task}/{split}.json has sha256 {found['sha256'][:16]}...; {variant}'s begins with {known}. "
                "Same number of rows, other bytes."
            )
    return warnings
