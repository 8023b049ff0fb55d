"""Experiments: what is trained on what and how, from a config to a run folder and its report."""
