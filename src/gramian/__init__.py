"""Signals, outliers, trajectories and uncertainty of deep networks, read off Gram matrices."""

__version__ = "0.1.0"
