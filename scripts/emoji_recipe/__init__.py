# SPDX-License-Identifier: Apache-2.0
"""Builds the emoji data set: sources and rendering, split by drawing, card."""
