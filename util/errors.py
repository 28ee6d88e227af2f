"""The exception that stands for a mistake of the user's."""


def first_five(problems):
    """Return one string for a list of at least one problem: the only one, or their number and the first five."""
    if len(problems) == 1:
        return problems[0]
    rest = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return f"{len(problems)} problems: {'; '.join([*problems[:5], *rest])}"


class UserError(Exception):
    """A mistake that the user can fix: shown as one line, with exit status 2 and no traceback.

    The message names the file, the row or the key, and says what is wrong and what would be right.
    """

    def __init__(self, message):
        # An exception from a data loading worker arrives with the worker's traceback in its message.
        super().__init__(" ".join(message.rsplit(f"{type(self).__name__}: ", 1)[-1].split()))
