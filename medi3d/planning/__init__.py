"""`medi3d prepare`: a cohort examined, and the settings chosen for it."""
