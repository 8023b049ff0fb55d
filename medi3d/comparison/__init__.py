"""`medi3d compare`: which pretraining transfers, on whose data, with how many labelled cases."""
