"""The sharded cache of representations: ids and rows, nothing of models."""
