"""Owner policies as dependencies of FastAPI's, of a request's or a WebSocket's connection."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, HTTPException, status

from celeriac import records
from celeriac.web.owners import PUBLIC, Owner, Public, publisher, refusal

OwnerPolicy = Callable[..., Any]
T = TypeVar("T", bound=Owner)


async def public() -> Public:  # not in a thread of its own, as FastAPI runs what is synchronous
    """The policy that shows every task to everybody who knows its id."""
    return PUBLIC


def owned_by(policy: OwnerPolicy) -> Callable[..., AsyncIterator[None]]:
    """A dependency: what a request publishes belongs to its owner.

    `FastAPI(dependencies=[Depends(owned_by(policy))])`, or those of a router.
    """

    async def publish_as_owner(owner: Annotated[Owner, Depends(policy)]) -> AsyncIterator[None]:
        with records.as_owner(publisher(checked(owner))):
            yield

    return publish_as_owner


def checked(owner: T) -> T:
    """Refuse (403) whoever is called what beat's tasks belong to."""
    if (why := refusal(owner)) is not None:
        raise HTTPException(status.HTTP_403_FORBIDDEN, why)
    return owner
