# SPDX-License-Identifier: Apache-2.0
"""Shard a standalone language tower's embeddings under sequence parallelism, in megatron-core."""

import importlib

# By this very name, which type checkers take for true; `typing` would cost milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .runtime import SiteStatus, Status, applied, apply, remove, status
    from .sites import UnsupportedMegatronError
    from .startup import StartupError, disable, enable
    from .towers import NotCoveredError, Tower, audit

__all__ = [
    "NotCoveredError",
    "SiteStatus",
    "StartupError",
    "Status",
    "Tower",
    "UnsupportedMegatronError",
    "applied",
    "apply",
    "audit",
    "disable",
    "enable",
    "remove",
    "status",
]
__version__ = "0.1.0"

_HOMES = {
    "runtime": ("SiteStatus", "Status", "applied", "apply", "remove", "status"),
    "sites": ("UnsupportedMegatronError",),
    "startup": ("StartupError", "disable", "enable"),
    "towers": ("NotCoveredError", "Tower", "audit"),
}


def __getattr__(name: str) -> object:
    """Import what is asked for: where the fix is enabled, every process imports this package."""
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(importlib.import_module(f".{home}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
