"""Exceptions whose message is meant for the user: main.py prints it as one line, without a traceback, and exits."""


class UserError(Exception):
    """Something outside the program is wrong; the message names the culprit and what is allowed."""

    exit_code = 1


class ConfigError(UserError):
    """A value of the configuration is wrong."""

    exit_code = 2


class Lost(UserError):
    """Another process of the same job has ended or cannot be reached; its own line says more, if it had the time."""

    exit_code = 69  # the launcher makes it a 1; it tells the victims from the culprit


class Stopped(UserError):
    """A signal asked for a stop and all work is saved; the same command goes on.

    Args:
        trained: a training has begun, so that trainer.resume=never would throw away what it has saved.
    """

    exit_code = 75

    def __init__(self, message: str, trained: bool = False) -> None:
        super().__init__(message)
        self.trained = trained
