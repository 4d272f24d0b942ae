"""Finite networks: plain torch modules, each usable alone."""
