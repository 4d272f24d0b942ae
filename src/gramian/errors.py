"""Failures that a user can act on; every message is one sentence, and the command line prints only that."""

LONGEST = 500
"""Characters of the longest message; what a file says may be of any length."""

TAIL = 150
"""Characters kept of the end of one that is longer."""


class GramianError(Exception):
    """Base of all failures that gramian explains itself; the message is one line, fit for a terminal."""

    def __init__(self, message: str = ""):
        line = "".join(each if each.isprintable() else " " for each in message[: 2 * LONGEST])
        if len(message) > LONGEST:
            end = "".join(each if each.isprintable() else " " for each in message[-TAIL:])
            line = f"{line[: LONGEST - TAIL - 3].rstrip()} … {end.lstrip()}"
        super().__init__(line.strip())


class InputError(GramianError, ValueError):
    """What was given cannot be used; the message names it and says what is accepted."""


class DivergedError(GramianError, ArithmeticError):
    """Training produced a number that is not finite; the message gives the step and what was kept."""


class StoppedError(GramianError):
    """A run was stopped by a signal after saving; the message gives the step and how to go on."""


class MissingExtraError(GramianError, ImportError):
    """A feature needs a package of an optional extra; the message names the extra."""
