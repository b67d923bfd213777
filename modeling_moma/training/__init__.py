# SPDX-License-Identifier: Apache-2.0
"""Training runs: examples, stages, what they log and leave behind."""
