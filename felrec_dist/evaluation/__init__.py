"""Ranks by counting, protocols, partitions, tables."""
