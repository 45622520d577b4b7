# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron_sp_fix``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
