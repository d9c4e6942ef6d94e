"""The one exception that is for the user."""


class UserError(ValueError):
    """Something the user can put right: a key, a row, a path, a missing connection.

    The message is a single line that says what is wrong and what to change. `launch.py` prints it
    without a traceback and exits with code 1; every other exception is a defect of ours and keeps
    its traceback.
    """


def one_line(error: BaseException | str) -> str:
    """Return an error's text on a single line, for messages that quote another library's."""
    return " ".join(str(error).split())
