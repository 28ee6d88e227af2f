"""The one exception that stands for a mistake of the user's."""


def first_five(problems):
    """One text of a list of at least one: the only one, or for several their number and the first five."""
    if len(problems) == 1:
        return problems[0]
    rest = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return f"{len(problems)} problems: {'; '.join([*problems[:5], *rest])}"


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit status 2, no traceback.

    The message names the file, the row or the key, says what is wrong and what would be right.
    """

    def __init__(self, message):
        # An exception raised in a data loading worker comes back with the worker's traceback as its text.
        super().__init__(" ".join(message.rsplit(f"{type(self).__name__}: ", 1)[-1].split()))
