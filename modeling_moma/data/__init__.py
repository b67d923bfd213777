# SPDX-License-Identifier: Apache-2.0
"""Data of a training: sources of any form, their tokens in shards, and the stream that a model reads."""
