"""The command line and the start of runs on Ray."""
