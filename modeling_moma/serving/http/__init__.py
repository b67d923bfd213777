# SPDX-License-Identifier: Apache-2.0
"""What `moma serve` adds to `transformers serve`: bad requests get 4xx and the name of the field.

A request takes this path:

1. `Guard`: its route, key, size and client, and whether there is a free slot (guard.py)
2. check: its fields and messages, in a thread (fields.py, messages.py)
3. download: its images of the web (downloads.py)
4. turn: until few enough others are being answered (generation.py)
5. read: images and words become tokens, in a thread (answering.py, messages.py)
6. generate: Transformers' own handler, which ends with its client (generation.py)

Only the command imports this. The checks are set on the one server that runs; no class of Transformers is changed.
"""
