# SPDX-License-Identifier: Apache-2.0
"""What `moma serve` adds to `transformers serve`: bad requests are refused by 4xx and the name of the field.

Only the command imports this. The checks are set on the one server that runs; no class of Transformers is changed.
"""
