# SPDX-License-Identifier: Apache-2.0
"""Builds corpora out of Debian packages: the packages, what is read from them, the folder with its card."""
