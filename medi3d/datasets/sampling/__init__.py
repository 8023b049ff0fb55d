"""Patches, augmentation, and the stream of batches."""
