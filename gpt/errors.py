"""UserError: the error for mistakes that a user can fix; its subclasses say which rank reports it."""


class UserError(Exception):
    """Mistake in flags, files or folders; its message is one line that names the place, the value and the remedy.

    The command line prints that line on stderr, without a traceback, and exits with status 2.
    """


class ReportedError(UserError):
    """Mistake that another rank of the same run reports, so this rank ends without a message."""


class OwnError(UserError):
    """Mistake that only this rank can report, because rank 0 is out of reach; it does not wait for rank 0."""
