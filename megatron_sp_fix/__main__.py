# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron_sp_fix``."""

from .cli import main

raise SystemExit(main())
