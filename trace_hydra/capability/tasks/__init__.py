"""Task files for lm-evaluation-harness, and the rows they ask for."""
