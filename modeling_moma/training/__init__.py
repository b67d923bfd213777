# SPDX-License-Identifier: Apache-2.0
"""Training runs: recipes, stages, what is frozen, what they log and leave behind."""
