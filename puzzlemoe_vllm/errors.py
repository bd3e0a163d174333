"""The one kind of error that a user can act on."""


class UserError(ValueError):
    """What the command prints in one line: the text names the file, tensor or option and the way out."""
