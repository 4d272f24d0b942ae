"""Smaller numbers: what a network loses when its linear layers compute in eight bits."""
