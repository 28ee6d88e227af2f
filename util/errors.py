"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit status 2, no traceback.

    The message names the file, the row or the key, says what is wrong and what would be right.
    """

    def __init__(self, message):
        # An exception raised in a data loading worker comes back with the worker's traceback as its text.
        super().__init__(" ".join(message.rsplit("UserError: ", 1)[-1].split()))
