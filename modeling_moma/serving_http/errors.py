# SPDX-License-Identifier: Apache-2.0
"""The refusal of a request."""


class RequestError(ValueError):
    """A field of a request cannot be answered.

    Args:
        field: its place in the body, as `messages[0].role`.
        reason: what is wrong with it, and what would be right.
        status: of HTTP, from 400 to 499.
    """

    def __init__(self, field: str, reason: str, status: int = 400):
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.status = status

    def body(self) -> dict:
        """The answer, in OpenAI's form of errors."""
        error = {"message": str(self), "type": "invalid_request_error", "param": self.field, "code": None}
        return {"error": error}
