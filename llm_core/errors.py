"""What can go wrong, sorted by who can mend it; each class carries the exit code of the command-line tools."""


class TextmillError(Exception):
    """Base of every error whose message is meant for the user and stands without a traceback."""

    exit_code = 1


class UserError(TextmillError):
    """An option, a folder or a combination of them does not fit; running again unchanged cannot help."""

    exit_code = 2


class DataError(TextmillError):
    """A file is missing, damaged or not what its manifest says; the message names it."""

    exit_code = 3


class Preempted(TextmillError):
    """The run was asked to stop, saved its state and ended early; running it again resumes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
