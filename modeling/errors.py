"""The one exception whose message is meant for the user: main.py prints it as one line, without a traceback."""


class UserError(Exception):
    """Something outside the program is wrong; the message names the culprit and what is allowed."""
