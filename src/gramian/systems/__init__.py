"""The published systems, one file each: what is claimed, the settings, the run, and the check."""
