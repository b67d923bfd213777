# SPDX-License-Identifier: Apache-2.0
"""The server of `moma serve`. A request passes guard.py, server.py, requests.py and generation.py, in this order."""
