# SPDX-License-Identifier: Apache-2.0
"""How a model of icons and their names is measured on held-out icons, and what its card says of it."""
