# SPDX-License-Identifier: Apache-2.0
"""A trained model with one feed-forward network for each modality, or one for all, grows experts."""
