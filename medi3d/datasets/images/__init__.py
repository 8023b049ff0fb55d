"""Volumes: file formats, geometry, resampling, intensities."""
