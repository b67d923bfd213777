# SPDX-License-Identifier: Apache-2.0
"""What a trained model can do, measured on held-out documents and captioned pictures of any source."""
