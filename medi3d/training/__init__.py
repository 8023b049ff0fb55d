"""`medi3d train` and `medi3d pretrain`: one training from an experiment to its run folder."""
