"""Random numbers that depend on a seed and on what they are for, and on nothing else: not on order, threads or machine.

Philox is a counter-based generator: a key chooses the stream, a counter the place in it (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011). Only its raw 64-bit numbers are used: NumPy keeps those from version to
version, the distributions of its `Generator` not.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def random_bits(seed: int, *identity: str | int, count: int, block: int = 0) -> np.ndarray:
    """`count` uniform 64-bit numbers for what `identity` names: the stream's block number `block` (2^128 numbers each).

    The key is the head of the SHA-256 of the JSON list `[seed, *identity]`.
    """
    digest = hashlib.sha256(json.dumps([seed, *identity]).encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=block << 128)
    return stream.random_raw(count)


def permutation(seed: int, *identity: str | int, count: int) -> np.ndarray:
    """The numbers 0 to `count` - 1 in a random order: the stable order of as many raw numbers."""
    return np.argsort(random_bits(seed, *identity, count=count), kind="stable")
