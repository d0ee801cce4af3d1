"""Hydra plugin: `hydra/sweeper=trace`. Discovery imports it at every start, so it loads neither torch nor lightning."""
