"""What stays of a run or a sweep: results.json, reports, figures and tables."""
