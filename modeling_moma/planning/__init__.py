# SPDX-License-Identifier: Apache-2.0
"""What a training costs before it begins: FLOPs, memory and traffic in closed form, and the best layout of GPUs."""
