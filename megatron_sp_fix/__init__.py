# SPDX-License-Identifier: Apache-2.0
"""Shard a standalone language tower's embeddings under sequence parallelism, in megatron-core."""

from .runtime import SiteStatus, Status, applied, apply, remove, status
from .sites import UnsupportedMegatronError

__all__ = [
    "SiteStatus",
    "Status",
    "UnsupportedMegatronError",
    "applied",
    "apply",
    "remove",
    "status",
]
__version__ = "0.1.0"
