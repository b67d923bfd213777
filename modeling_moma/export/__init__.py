# SPDX-License-Identifier: Apache-2.0
"""A trained model for use elsewhere: quantised, or as graphs that run without this package and without torch."""
