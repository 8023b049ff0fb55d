"""`medi3d prepare`: examine a cohort and choose its settings."""
