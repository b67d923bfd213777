# SPDX-License-Identifier: Apache-2.0
"""What a trained model can do on held-out documents and captioned pictures, and which expert takes which token."""
