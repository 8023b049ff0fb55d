"""`medi3d predict`, `features` and `classify`: a trained network on new files."""
