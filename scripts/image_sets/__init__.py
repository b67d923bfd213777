# SPDX-License-Identifier: Apache-2.0
"""How the data sets of emoji and of icons are built out of npm packages."""
