"""Rows of the catalogue of weights, by what the networks were trained on."""

from medi3d.weights.rows import clips, images, volumes
from medi3d.weights.rows.row import InputContract, Package, WeightsRow

ROWS = (*images.ROWS, *clips.ROWS, *volumes.ROWS)

__all__ = ["ROWS", "InputContract", "Package", "WeightsRow"]
