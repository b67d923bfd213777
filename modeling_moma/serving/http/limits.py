# SPDX-License-Identifier: Apache-2.0
"""What one request and all of them together may take. `docs/how-to/serve.md` lists these numbers."""

from dataclasses import dataclass


# bodies above `LARGE_BODY_BYTES` are few at once, since each is held three times while it is read
MAX_BODY_BYTES = 32 << 20
LARGE_BODY_BYTES = 1 << 20
MAX_LARGE_BODIES = 4
# values are counted by their commas and brackets: JSON's objects take a hundred times the bytes that write them
MAX_VALUES = 250_000
MAX_DEPTH = 16
# a client has so long to send its body, and to take a piece of its answer
BODY_SECONDS = 20.0
SEND_SECONDS = 30.0
# after so long a connection is asked again whether its client has gone
LISTEN_SECONDS = 1.0
# connections count whether they ask something or not
MAX_CONNECTIONS = 256

MAX_MESSAGES = 256
MAX_PARTS = 64
# all texts of a request are counted together
MAX_CHARACTERS = 200_000
# an image of this many pixels takes 50 MB while it is read, and is then scaled down to the model's few
MAX_IMAGES, MAX_WEB_IMAGES = 16, 4
MAX_PIXELS, MAX_PIXELS_TOGETHER, MAX_SIDE = 2**24, 2**26, 2**14
# a sound of this many samples takes 16 MB while it is read
MAX_SOUNDS, MAX_SAMPLES = 16, 2**22

MAX_DOWNLOAD_BYTES = 16 << 20
# all downloads of a request share this time
DOWNLOAD_SECONDS = 10.0
# so many downloads run at once, and so many more may wait for their turn
DOWNLOADS, WAITING_DOWNLOADS = 4, 4
MAX_REDIRECTS = 3

# the search for each stop string begins with a walk over the whole vocabulary
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 64
MAX_BEAMS = 4
# logits are divided by it, and would become infinite
MIN_TEMPERATURE = 1e-3
MAX_BIASES = 1024
# requests are parsed and tokenized in this many threads
READERS = 2


@dataclass(frozen=True)
class Limits:
    """What the command line sets.

    Args:
        max_requests (`int`, *optional*, defaults to `8`):
            that are tokenized or generated for at once; one is generated for at a time.
        max_waiting (`int`, *optional*, defaults to `32`):
            that are queued beside them.
        max_new_tokens (`int`, *optional*, defaults to `4096`):
            of an answer, at most.
        max_seconds (`float`, *optional*, defaults to `120.0`):
            of generation, at most; an answer ends there.
        template_arguments (`frozenset[str]`, *optional*, defaults to `frozenset()`):
            names that `chat_template_kwargs` may give to the chat template.
        pinned (`str`, *optional*):
            the one model, or `None` where requests choose.
    """

    max_requests: int = 8
    max_waiting: int = 32
    max_new_tokens: int = 4096
    max_seconds: float = 120.0
    template_arguments: frozenset[str] = frozenset()
    pinned: str | None = None
