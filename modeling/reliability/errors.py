"""Exceptions whose message is for the user: main.py prints it as one line, without a traceback, and exits.

Errors of memory, disk and compiler get such a line from `explain`. Every other exception is a bug.
"""

import errno


class UserError(Exception):
    """Something outside the program is wrong; the message names the cause and what is allowed."""

    exit_code = 1


class ConfigError(UserError):
    """A value of the configuration is wrong."""

    exit_code = 2


class ConnectionLost(UserError):
    """Another process of the same job has ended or cannot be reached: a consequence, hardly ever the cause."""

    exit_code = 69  # between a worker and its launcher, which ends with 1


class Stopped(UserError):
    """A signal asked for a stop and all work is saved; if it has `trained`, `trainer.resume=never` would discard it."""

    exit_code = 75

    def __init__(self, message: str, trained: bool = False) -> None:
        super().__init__(message)
        self.trained = trained


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raises the ConfigError of a key whose value is not allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {allowed}")


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE)
COMPILERS = ("torch._dynamo", "torch._inductor", "triton")
LESS_MEMORY = {
    "train": "lower trainer.batch_size or trainer.micro_batch_size",
    "sample": "lower sampler.batch_size",
    "evaluate": "lower evaluation.batch_size and sampler.batch_size",
}


def explain(error: Exception, stage: str) -> str | None:
    """The line for an error of the machine or its compiler in `stage`, or None if the error is a bug."""
    if out_of_memory(error):
        advice = LESS_MEMORY.get(stage, "use fewer or smaller images")
        return f"out of memory in stage {stage} ({short(error)}): {advice}, or choose a smaller model or precision=bf16"
    if type(error).__module__.startswith(COMPILERS):
        return f"torch.compile failed ({short(error)}): trainer.compile=false and sampler.compile=false do without it"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename or 'a file'}: {error.strerror}; run the same command again once that is mended"
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether the device or the machine has run out of memory."""
    # By name, since this module must not import torch: main.py starts fast.
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError")
    # The second is what is left for a process that finds the GPU full before it has asked for anything.
    said = ("DefaultCPUAllocator: can't allocate", "CUDA error: out of memory")
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))


def short(error: BaseException) -> str:
    """The message of an error in one line of at most 160 characters; its type if it has no message."""
    return " ".join(str(error).split())[:160] or type(error).__name__
