"""Failures that a user can act on; every message is one sentence, and the command line prints only that."""


class GramianError(Exception):
    """Base of all failures that gramian explains itself."""


class InputError(GramianError, ValueError):
    """What was given cannot be used; the message names it and says what is accepted."""


class DivergedError(GramianError, ArithmeticError):
    """Training produced a number that is not finite; the message gives the step and what was kept."""


class StoppedError(GramianError):
    """A run was stopped by a signal after saving; the message gives the step and how to go on."""


class MissingExtraError(GramianError, ImportError):
    """A feature needs a package of an optional extra; the message names the extra."""
