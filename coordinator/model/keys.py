"""Keys and their hashes: what a shard's range is made of.

A key is a user id of 1 to 512 bytes of UTF-8. Its hash is XXH3-64 of those bytes, an unsigned 64-bit integer; the same
in every process, on every machine and in every version of this software.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from coordinator.model.errors import InvalidRequest

KEY_BYTES_MAX = 512
HASH_SPACE = 1 << 64
"""Number of key hashes; the `hi` of the last shard."""


def check_key(key: str, what: str = "key") -> bytes:
    """The key's UTF-8 bytes. Raises InvalidRequest, which calls it `what`, when it is empty, too long, or has lone
    surrogates."""
    try:
        encoded = key.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest(f"{what} {key!r} is not valid Unicode; use text that encodes as UTF-8") from None
    if not 1 <= len(encoded) <= KEY_BYTES_MAX:
        raise InvalidRequest(f"a {what} has 1 to {KEY_BYTES_MAX} bytes of UTF-8, this one has {len(encoded)}")
    return encoded


def key_hash(key: str) -> int:
    """XXH3-64 of the key, 0 <= hash < 2^64. Raises InvalidRequest as `check_key` does."""
    return xxh3_64_intdigest(check_key(key))
