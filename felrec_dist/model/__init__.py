"""FELRec as in the paper: encoder, heads, losses, queue."""
