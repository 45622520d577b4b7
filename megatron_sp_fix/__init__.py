# SPDX-License-Identifier: Apache-2.0
"""Shard a standalone language tower's embeddings under sequence parallelism, in megatron-core."""

from .audit import NotCoveredError, Tower, audit
from .runtime import SiteStatus, Status, applied, apply, remove, status
from .sites import UnsupportedMegatronError

__all__ = [
    "NotCoveredError",
    "SiteStatus",
    "Status",
    "Tower",
    "UnsupportedMegatronError",
    "applied",
    "apply",
    "audit",
    "remove",
    "status",
]
__version__ = "0.1.0"
