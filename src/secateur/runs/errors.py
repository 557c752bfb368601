"""The one exception a user is meant to read."""


class SecateurError(Exception):
    """A problem the user can act on.

    The message is one sentence that names the thing, what was expected and what to do.
    """
