"""One training loop, its optimiser and schedule, and the folder that a run lives in."""
