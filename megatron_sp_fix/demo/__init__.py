# SPDX-License-Identifier: Apache-2.0
"""The bug and the fix in a table: real ranks, small models, a plain LM beside its tower."""

from .table import demo

__all__ = ["demo"]
