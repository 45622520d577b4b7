# SPDX-License-Identifier: Apache-2.0
"""Run a multimodal model's language tower alone under sequence parallelism, in megatron-core."""

from .launch import disable, enable
from .patching import SiteStatus, Status, applied, apply, remove, status
from .sites import UnsupportedMegatronError
from .towers import NotCoveredError, Tower, audit

__all__ = ["applied", "apply", "audit", "disable", "enable", "remove", "status"]
__all__ += ["NotCoveredError", "SiteStatus", "Status", "Tower", "UnsupportedMegatronError"]
__version__ = "0.2.0.dev0"
