# SPDX-License-Identifier: Apache-2.0
"""What `run` and `enable` add to a process that never imports megatron-core, in milliseconds.

Starts ``python -c pass`` in a virtual environment as it is, with the folder on ``PYTHONPATH``, and
with the file in site-packages, interleaved.

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
from unittest import mock

from megatron_sp_fix import enable, launch

ROUNDS, LIMIT = 100, 5.0


def seconds(python: str, **variables: str) -> float:
    """Time one process from its start to its end, with byte code as pip leaves it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True, env={**plain, **variables})
    return time.perf_counter() - begin


def main() -> int:
    """Measure, print, and compare with the limit."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True, with_pip=False)
        python = f"{folder}/bin/python"
        (packages,) = Path(folder).glob("lib/python*/site-packages")
        # By a name that is read before the file's.
        (packages / "_paths.pth").write_text(str(Path(launch.__file__).parents[1]))
        without: list[float] = []
        more: dict[str, list[float]] = {"run": [], "enable": []}
        for _ in range(ROUNDS):
            without.append(seconds(python))
            more["run"].append(seconds(python, PYTHONPATH=launch.FOLDER) - without[-1])
            with mock.patch("sysconfig.get_path", lambda name: str(packages)):
                file = Path(enable())
            more["enable"].append(seconds(python) - without[-1])
            file.unlink()
    print(f"a process by itself: {1e3 * statistics.median(without):.1f} ms")
    worst = 0.0
    for name, differences in more.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(differences, n=4))
        print(f"{name}: +{middle:.2f} ms (quartiles {low:.2f} to {high:.2f}), limit {LIMIT} ms")
        worst = max(worst, middle)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
