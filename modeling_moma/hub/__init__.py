# SPDX-License-Identifier: Apache-2.0
"""A model repository for the Hub: what goes in, what is checked before it leaves, and the one commit."""
