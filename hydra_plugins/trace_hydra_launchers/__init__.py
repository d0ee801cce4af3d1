"""Hydra plugin: launchers whose jobs go on after a time limit, a preemption or a lost machine, and their settings.

Discovery imports it at every start, so it loads neither torch nor what the launchers themselves need.
"""
