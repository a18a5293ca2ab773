"""Exceptions, by who can fix the problem. Each class has the exit code of the command-line tools."""


class TextmillError(Exception):
    """Base of the errors whose message is for the user and is printed without a traceback."""

    exit_code = 1


class UserError(TextmillError):
    """An option, a folder or a combination of options is wrong; a retry without a change cannot succeed."""

    exit_code = 2


class DataError(TextmillError):
    """A file is missing, damaged or does not match its manifest; the message names it."""

    exit_code = 3


class Preempted(TextmillError):
    """The run was asked to stop, saved its state and ended early; running it again resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
