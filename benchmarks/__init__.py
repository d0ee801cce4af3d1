"""Timings against what a user would take instead: `python -m benchmarks.<name>`; not part of the installed package."""
