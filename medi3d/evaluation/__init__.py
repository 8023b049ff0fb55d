"""`medi3d evaluate`: scores of a run's best network, case by case."""
