"""W&B's pages for a project: a workspace and a report, made from code."""
