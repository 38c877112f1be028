"""The one exception a user of the pipeline is meant to read."""


class InputError(ValueError):
    """Something the user gave (a file, a row, an option, a model directory) cannot be used.

    The message is one sentence that names the thing, the place and the remedy; the command line prints it without a
    traceback and ends with exit code 2.
    """
