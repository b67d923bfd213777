# SPDX-License-Identifier: Apache-2.0
"""Builds the icon data set: sets and rendering, names and families, near-identical drawings, splits, card."""
