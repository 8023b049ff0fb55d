"""Published weights: the catalogue, safe readers, key maps and loading."""
