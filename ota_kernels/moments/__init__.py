"""Second moments: get them out of checkpoints, shrink them, look at them, or estimate them."""
