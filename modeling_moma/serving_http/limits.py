# SPDX-License-Identifier: Apache-2.0
"""What one request and all of them together may take. `docs/how-to/serve.md` lists these numbers."""

from dataclasses import dataclass, field

from .hosts import ImageHosts


# of a body; those above `LARGE_BODY_BYTES` are few at once, since each is held three times while it is read
MAX_BODY_BYTES = 32 << 20
LARGE_BODY_BYTES = 1 << 20
MAX_LARGE_BODIES = 4
# commas and brackets in a body: JSON's objects take a hundred times the bytes that write them
MAX_VALUES = 250_000
MAX_DEPTH = 16
# until the whole body is there, and until a client takes a piece of its answer
BODY_SECONDS = 20.0
SEND_SECONDS = 30.0
# open connections of the process, whatever they do
MAX_CONNECTIONS = 256

MAX_MESSAGES = 256
MAX_PARTS = 64
# of all texts of a request together
MAX_CHARACTERS = 200_000
# a picture is scaled down to the model's few pixels anyway; one of so many takes 50 MB while it is read
MAX_PICTURES, MAX_WEB_PICTURES = 16, 4
MAX_PIXELS, MAX_PIXELS_TOGETHER = 2**24, 2**26

MAX_DOWNLOAD_BYTES = 16 << 20
# for all pictures of a request
DOWNLOAD_SECONDS = 10.0
# downloads at once, and requests that may wait for one of these places
DOWNLOADS, WAITING_DOWNLOADS = 4, 4
MAX_REDIRECTS = 3

# the search for each of them begins with a walk over the whole vocabulary
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 64
MAX_BEAMS = 4
MAX_BIASES = 1024
# threads that read requests; a request is read in one of them
READERS = 2


@dataclass(frozen=True)
class Limits:
    """What the command line sets.

    Args:
        max_requests: at once, which are made tokens of or generated for; one is generated for at a time.
        max_waiting: beside them.
        max_new_tokens: of an answer, at most.
        max_seconds: of generation, at most; an answer ends there.
        template_arguments: names that `chat_template_kwargs` may give to the chat template.
        image_hosts: hosts that pictures may be fetched from.
        pinned: the one model, or `None` where requests choose.
    """

    max_requests: int = 8
    max_waiting: int = 32
    max_new_tokens: int = 4096
    max_seconds: float = 120.0
    template_arguments: frozenset[str] = frozenset()
    image_hosts: ImageHosts = field(default_factory=ImageHosts)
    pinned: str | None = None
