# SPDX-License-Identifier: Apache-2.0
"""What a trained model can do on held-out documents and captioned images, and which expert takes which token."""
