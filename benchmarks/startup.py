# SPDX-License-Identifier: Apache-2.0
"""What `enable` adds to the start of a process that never imports megatron-core, in milliseconds.

Starts ``python -c pass`` in a virtual environment with and without the file, interleaved.

Example:
    python benchmarks/startup.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from megatron_sp_fix import startup

ROUNDS, LIMIT = 100, 5.0


def seconds(python: str, folder: str) -> float:
    """Time one process from its start to its end, with byte code as pip leaves it."""
    environment = {name: value for name, value in os.environ.items() if "BYTECODE" not in name}
    environment["PYTHONPYCACHEPREFIX"] = folder
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True, env=environment)
    return time.perf_counter() - begin


def main() -> int:
    """Measure, print, and compare with the limit."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True, with_pip=False)
        python = f"{folder}/bin/python"
        (packages,) = Path(folder).glob("lib/python*/site-packages")
        # By a name that is read before the file's.
        (packages / "_paths.pth").write_text(str(Path(startup.__file__).parents[1]))
        file = packages / startup.FILE
        without, differences = [], []
        for _ in range(ROUNDS):
            file.unlink(missing_ok=True)
            without.append(seconds(python, folder))
            file.write_text(startup._text())
            differences.append(seconds(python, folder) - without[-1])
    low, middle, high = (1e3 * value for value in statistics.quantiles(differences, n=4))
    print(f"a process by itself: {1e3 * statistics.median(without):.1f} ms")
    print(f"where enabled: +{middle:.2f} ms (quartiles {low:.2f} to {high:.2f}), limit {LIMIT} ms")
    return int(middle > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
