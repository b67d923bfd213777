# SPDX-License-Identifier: Apache-2.0
"""What several folders use: files that are complete or missing, tables, errors, messages, hardware."""
