"""A seeded pseudo-random permutation of range(n), computed element by element.

In: indices, n, seed, epoch. Out: their images; no table, so memory is that of the indices. The cipher is a Feistel
network on Z_a x Z_b, a and b about sqrt(n), with cycle walking: an image outside range(n) is enciphered again until it
falls inside (Black and Rogaway, CT-RSA 2002). As a b - n < a, that happens to about one index in sqrt(n).
The result is part of the format of a resumable run: it must never change for given arguments.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from dig_shards.errors import ShardError

_ROUNDS = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FINALISER = np.uint64(0xBF58476D1CE4E5B9)
_LARGEST = 2**62


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images, int64 in range(n), of indices in range(n) under the permutation of (seed, epoch); a bijection for n >= 1.

    Raises ShardError for n outside 1..2^62 or an index outside range(n).
    """
    given = np.asarray(index, dtype=np.int64)
    if not 1 <= n <= _LARGEST:
        raise ShardError(f"cannot permute range({n}): expected 1 <= n <= 2^62")
    flat = np.atleast_1d(given).ravel()
    if flat.size and not (int(flat.min()) >= 0 and int(flat.max()) < n):
        raise ShardError(f"index {int(flat.min())}..{int(flat.max())} is outside range({n})")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _round_keys(seed, epoch)
    image = _encipher(flat.astype(np.uint64), np.uint64(a), np.uint64(b), keys)
    outside = np.flatnonzero(image >= n)
    while outside.size:
        image[outside] = _encipher(image[outside], np.uint64(a), np.uint64(b), keys)
        outside = outside[image[outside] >= n]
    return image.astype(np.int64).reshape(given.shape)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"dig-permutation/{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _encipher(value: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass over range(a b): each round adds to one part a hash of the other, hence is invertible."""
    high, low = np.divmod(value, b)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            high = (high + _hash(low, key)) % a
        else:
            low = (low + _hash(high, key)) % b
    return np.asarray(high * b + low)


def _hash(value: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = (value ^ key) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(32))) * _FINALISER
    return np.asarray(mixed >> np.uint64(24))
