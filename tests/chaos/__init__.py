"""Runs whose processes are killed, over and over, and that end as if nothing had happened.

``make chaos`` runs the long version.
"""
