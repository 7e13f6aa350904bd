"""Randomness as a function: the seed of each draw, from the seed of the run, what is drawn, and the step."""

import hashlib

import numpy as np


def step_seed(seed: int, stream: str, step: int) -> int:
    """A 63-bit seed for what happens in one step of one stream. A CPU's generator uses the low 32 bits of it."""
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big")
    words = np.random.SeedSequence([seed, key, step]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])
