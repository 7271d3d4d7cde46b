"""Independent seeds."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *what: object) -> int:
    """A seed for one purpose, so that no draw depends on the number of draws before it."""
    text = " ".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
