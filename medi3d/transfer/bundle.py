"""Names that old bundles import: see `medi3d.export.bundle`. Goes with the next version."""

from medi3d.export.bundle import load_predictor, predict, with_norms

__all__ = ["load_predictor", "predict", "with_norms"]
