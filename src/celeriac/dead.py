"""Dead letters: messages that will not run again by themselves, kept until somebody decides.

Two hashes beside each other: what is known of a letter as JSON, and the message as it came. They
are in the broker's Redis, or else in that of the results.
"""

import hashlib
import json
import time
from typing import Any

import redis

_KNOWN, _RAW = "celeriac:dead", "celeriac:dead:raw"


def keys(prefix: str = "") -> tuple[str, str]:
    return f"{prefix}{_KNOWN}", f"{prefix}{_RAW}"


def bury_raw(
    client: redis.Redis, prefix: str, raw: bytes, queue: str, reason: str, **known: Any
) -> None:
    """Keep a message as it came. Twice the same message is one letter."""
    known |= {"reason": reason, "list": queue, "size": len(raw), "time": time.time()}
    letter = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
    of_known, of_raw = keys(prefix)
    with redis.Redis.pipeline(client) as pipe:
        pipe.hset(of_raw, letter, raw)
        pipe.hset(of_known, letter, json.dumps(known))
        pipe.execute()
