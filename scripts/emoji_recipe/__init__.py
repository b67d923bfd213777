# SPDX-License-Identifier: Apache-2.0
"""What is of the emoji alone: how their data set is built, and how a model of it is judged, shown and described."""
