"""The one kind of error that a user can act on, and what its text may repeat of others' files."""


class UserError(ValueError):
    """What the command prints in one line: the text names the file, tensor or option and the way out."""


def shown(value: object, limit: int = 100) -> str:
    """Text from a file as a message may repeat it: in one line, cut in the middle to `limit` characters."""
    text = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value)[: 100 * limit]
    )
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[len(text) - limit // 2 + 3 :]}"
