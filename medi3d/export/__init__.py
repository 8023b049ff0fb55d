"""`medi3d export`: networks and runs for other programs."""
