# SPDX-License-Identifier: Apache-2.0
"""What runs without this package, and without torch: graphs of the picture tokenizer."""
