# SPDX-License-Identifier: Apache-2.0
"""The command `moma`: a thin driver for each subcommand."""
