# SPDX-License-Identifier: Apache-2.0
"""What is of the icons alone: how their data set is built, how a model of them is measured, and its card."""
