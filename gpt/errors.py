"""The one kind of error that a user can cause and mend."""


class UserError(Exception):
    """A mistake in flags, files or folders, told in one line that names the place, the value and the remedy.

    The command line prints the line on stderr and exits with status 2; it is never shown with a traceback.
    """
