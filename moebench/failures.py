"""The one failure that is not a user's mistake and still deserves one line. Imports nothing."""


class RunError(Exception):
    """The run could not go on; what was measured is kept. The message is one line."""
