from typing import Annotated

from pydantic import BaseModel, ConfigDict, EmailStr, Field, StringConstraints

# No control characters: PostgreSQL does not store a zero byte, and a name that breaks the line or
# turns the writing direction deceives its reader.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
Username = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=128, pattern=rf"^[^{_CONTROL}]+$"
    ),
]
Email = Annotated[EmailStr, Field(max_length=128)]


class UserIn(BaseModel):
    username: Username
    email: Email


class UserOut(UserIn):
    model_config = ConfigDict(from_attributes=True)

    id: int


class TaskAccepted(BaseModel):
    task_id: str


class TaskState(BaseModel):
    state: str
    error: str | None = None


class Refusal(BaseModel):
    detail: str
