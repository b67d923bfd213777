# SPDX-License-Identifier: Apache-2.0
"""Models in folders and on the Hub: how they are opened, what a repository holds, and the one commit of an upload."""
