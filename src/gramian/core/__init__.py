"""Tensor mathematics: the Gram matrix, the numbers read off it, and the same numbers from streams."""
