# SPDX-License-Identifier: Apache-2.0
"""Causal routing for a trained model: calibrated thresholds, auxiliary routers, and how well they hit the top K."""
