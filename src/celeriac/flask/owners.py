"""Owner policies of Flask's: functions that are called in a request."""

from collections.abc import Callable

from werkzeug.exceptions import Forbidden

from celeriac.web.owners import PUBLIC, Owner, Public, refusal

OwnerPolicy = Callable[[], Owner]


def public() -> Public:
    """The policy that shows every task to everybody who knows its id."""
    return PUBLIC


def checked(owner: Owner) -> Owner:
    """Refuse (403) whoever is called what beat's tasks belong to."""
    if (why := refusal(owner)) is not None:
        raise Forbidden(why)
    return owner
