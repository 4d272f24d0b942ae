"""Bayesian methods for any torch module: kernels of its Jacobian, ensembles, and what they predict."""
