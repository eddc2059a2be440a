"""What views and tasks ask for."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from project.config import Config, get_config
from project.database import new_async_session, new_session


def _session() -> Iterator[Session]:
    with new_session() as session:
        yield session


async def _async_session() -> AsyncIterator[AsyncSession]:
    async with new_async_session() as session:
        yield session


ConfigDep = Annotated[Config, Depends(get_config)]
SessionDep = Annotated[Session, Depends(_session)]
AsyncSessionDep = Annotated[AsyncSession, Depends(_async_session)]
