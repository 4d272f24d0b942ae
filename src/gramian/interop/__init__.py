"""gramian inside the users' own frameworks; each module imports its framework, the package itself none."""
