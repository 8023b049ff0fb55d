"""Volumes, clips and cohorts: read, checked, brought to one geometry, cut and augmented."""
