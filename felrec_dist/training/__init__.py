"""The step, the exchange between ranks, and the run around them."""
