# SPDX-License-Identifier: Apache-2.0
"""A page in the browser for one model: captions, drawings, words with images, and the routing (extra `demo`)."""
