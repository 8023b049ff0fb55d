"""Cohorts of volumes: lists, labels, splits, cache."""
