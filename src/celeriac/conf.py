"""An app's settings, found sooner than Celery does."""

from typing import Any

from celery import Celery
from celery.app.utils import Settings

_names: dict[tuple[Any, ...], tuple[str, ...]] = {}  # of settings, new and old
_keys: dict[tuple[str, str], str] = {}


class Conf(Settings):  # type: ignore[misc]
    """The same settings: Celery looks for eight of them for each message.

    Its own search raises and drops a dozen KeyErrors before it comes to a default.
    """

    def __getitem__(self, key: str) -> Any:
        names = _names.get((self.prefix, self._keys, key)) or self._learn(key)
        for each in self.maps:
            for name in names:
                if type(each) is not dict or name in each:
                    try:
                        return each[name]
                    except KeyError:
                        continue
        return super().__getitem__(key)

    def find_value_for_key(self, name: str, namespace: str = "celery") -> Any:
        key = _keys.get((name, namespace))
        if key is None:
            parts = self.find_option(name, namespace)[:-1]
            key = _keys[name, namespace] = "_".join(filter(None, parts))
        return self[key]

    def _learn(self, key: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(self._to_keys(key)))
        return _names.setdefault((self.prefix, self._keys, key), names)


def use_conf(app: Celery) -> None:
    """Give `app` these, unless it has a class of its own."""
    if type(app.conf) is Settings:
        faster = Conf({})
        object.__setattr__(faster, "__dict__", app.conf.__dict__)  # one, for who has the other
        app.conf = faster
