# SPDX-License-Identifier: Apache-2.0
"""What is done to a model from outside, on the machine that trains it: nothing here travels with a checkpoint."""
