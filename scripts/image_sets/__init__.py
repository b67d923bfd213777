# SPDX-License-Identifier: Apache-2.0
"""What the builders of data sets share: npm packages, Iconify's format, groups of rows, counts in a card."""
