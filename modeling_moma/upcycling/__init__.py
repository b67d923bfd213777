# SPDX-License-Identifier: Apache-2.0
"""A trained model grows: experts, where it has one network for each modality or one for all, and layers."""
