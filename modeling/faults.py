"""What goes wrong outside the program, in one line for the user: memory, disk, permissions. All else is a bug."""

import errno

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE)
SMALLER = {
    "train": "lower trainer.batch_size or trainer.micro_batch_size",
    "sample": "lower sampler.batch_size",
    "evaluate": "lower evaluation.batch_size and sampler.batch_size",
}


def explain(error: Exception, stage: str) -> str | None:
    """The line for an error that is no bug, or None.

    Args:
        error: that no module turned into a UserError.
        stage: in which it happened.
    """
    if out_of_memory(error):
        reason = " ".join(str(error).split())[:160]
        advice = SMALLER.get(stage, "use fewer or smaller images")
        return f"out of memory in stage {stage} ({reason}): {advice}, or choose a smaller model or precision=bf16"
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return f"{error.filename or 'a file'}: {error.strerror}; the same command goes on once that is put right"
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether memory has run out, of the device or of the machine."""
    # By name, since this module must not import torch: main.py starts fast.
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError")
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error))
