"""Studies: many runs over a grid of settings, what they cost, and what larger ones would cost."""
