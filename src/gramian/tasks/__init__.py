"""Whole jobs on a user's data: a configuration in, a run folder out."""
