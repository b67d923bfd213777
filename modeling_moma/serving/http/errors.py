# SPDX-License-Identifier: Apache-2.0
"""The error of a request, as HTTP answers it."""

from ...errors_moma import InputError


RETRY_SECONDS = 5


class RequestError(InputError):
    """A field of a request cannot be answered.

    Args:
        field (`str`):
            its place in the body, as `messages[0].role`.
        reason (`str`):
            what is wrong with it, and what would be right.
        status (`int`, *optional*, defaults to `400`):
            of HTTP, from 400 to 499; 429 says when to come back.
    """

    def __init__(self, field: str, reason: str, status: int = 400):
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.status = status

    def body(self) -> dict:
        """Return the answer, in OpenAI's form of errors."""
        error = {"message": str(self), "type": "invalid_request_error", "param": self.field, "code": None}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with the status."""
        extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_SECONDS)}}
        return extra.get(self.status, {})


def short(value: object, most: int = 80) -> str:
    """Return a value as a message shows it: bodies may hold images."""
    # a long value is cut before it is formatted
    text = repr(value[: most + 1] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def short_name(name: str) -> str:
    """Return a name as part of a field, without quotation marks."""
    return short(name).strip("'")
