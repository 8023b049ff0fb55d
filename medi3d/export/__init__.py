"""Networks and runs written for programs that do not have medi3d."""
