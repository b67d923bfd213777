# SPDX-License-Identifier: Apache-2.0
"""Builds the spoken words and labels: which, in which split, and how espeak-ng says them."""
