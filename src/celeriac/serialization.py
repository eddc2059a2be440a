"""kombu's JSON with less work: one encoder for all, and its types looked for only where they are.

kombu makes an encoder for each message, and calls a function for each object in it, to find dates
and the like. What is written and read stays the same, types that are registered later included.
"""

import json
from typing import Any

import kombu.utils.json as kombu_json
from kombu import serialization

dumps = kombu_json.JSONEncoder().encode
_decode = json.JSONDecoder().decode
_read_types = json.JSONDecoder(object_hook=kombu_json.object_hook).decode


def loads(text: Any) -> Any:
    """The value of JSON in a str, bytes or memoryview, as kombu reads it."""
    if not isinstance(text, str):
        text = bytes(text).decode()
    return _read_types(text) if '"__type__"' in text else _decode(text)


def use() -> None:
    """For what Celery sends, receives and stores as JSON; not in the place of somebody's own."""
    registry: Any = serialization.registry
    if registry._encoders["json"].encoder is kombu_json.dumps:
        registry.register("json", dumps, loads, "application/json", "utf-8")
