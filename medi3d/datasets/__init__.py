"""Volumes, clips and cohorts: reading, checking, resampling, patches and augmentation."""
