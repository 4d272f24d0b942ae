"""Limits of wide networks before training: kernels as folds of maps, and what they become with depth."""
