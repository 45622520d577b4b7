# SPDX-License-Identifier: Apache-2.0
"""Run a multimodal model's language tower alone under sequence parallelism, in megatron-core."""

from .patching import SiteStatus, Status, applied, apply, remove, status
from .sites import UnsupportedMegatronError

__all__ = [
    *("SiteStatus", "Status", "UnsupportedMegatronError"),
    *("applied", "apply", "remove", "status"),
]
__version__ = "0.1.0"
