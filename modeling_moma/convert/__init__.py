# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other models as MoMa models, tensor by tensor."""
