"""kombu's JSON, done faster, is the same JSON."""

import datetime
import uuid
from decimal import Decimal
from typing import Any

import pytest
from kombu import serialization
from kombu.exceptions import DecodeError, EncodeError
from kombu.utils import json

import celeriac.serialization
from celeriac.serialization import dumps, loads

registry: Any = serialization.registry
VALUES: list[object] = [
    None, [], {}, "é\u2028\"", 2**70, -0.5, {"a": [1, {"b": None}]}, float("inf"),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), datetime.date(2026, 1, 2),
    {"id": uuid.UUID(int=5), "of": [Decimal("1.50"), b"\xff\x00", b"text", datetime.time(1, 2)]},
    {"__type__": "strange"}, '"__type__"',
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_written_and_read_is_as_kombu_does_it(value: object) -> None:
    written = json.dumps(value)  # type: ignore[no-untyped-call]
    assert dumps(value) == written
    for form in (
        written,
        written.encode(),
        bytearray(written.encode()),
        memoryview(written.encode()),
    ):
        assert loads(form) == json.loads(written)  # type: ignore[no-untyped-call]


def test_a_type_that_is_registered_later_is_written_and_read() -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Point) and other.x == self.x

        def __hash__(self) -> int:
            return self.x

    json.register_type(Point, "point", lambda point: point.x, Point)
    try:
        assert loads(dumps([Point(3)])) == [Point(3)]
    finally:
        del json._encoders[Point], json._decoders["point"]


def test_errors_are_kombus() -> None:
    celeriac.serialization.use()
    with pytest.raises(EncodeError):
        registry.dumps(object(), "json")
    with pytest.raises(DecodeError):
        registry.loads(b"{", "application/json", "utf-8")


def test_somebody_elses_json_stays() -> None:
    before = registry._encoders["json"], registry._decoders["application/json"]
    try:
        registry.register("json", repr, str, "application/json", "utf-8")
        celeriac.serialization.use()
        assert registry._encoders["json"].encoder is repr
    finally:
        registry._encoders["json"], registry._decoders["application/json"] = before
