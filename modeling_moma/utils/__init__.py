# SPDX-License-Identifier: Apache-2.0
"""What several rooms borrow: files that are there whole or not at all, tables, errors, messages, hardware."""
