# SPDX-License-Identifier: Apache-2.0
"""Run the distributed suite on GPUs, with several releases of megatron-core.

TREES has a folder for each release, named by it, with the package `megatron` in it. What ran to its
end before is not run again, so a run that was cut off goes on. Runs share the GPUs.

Example:
    pip install --no-deps --target TREES/0.19.2 megatron-core==0.19.2
    python tests/gpu.py TREES --into RESULTS --seconds 540
"""

import argparse
import collections
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: What runs together, and in which dtypes; most wanted first.
SUITES = {
    "layers": (["transformer_engine"], ["bf16"]),
    "towers": (["towers_on_gpus"], ["bf16"]),
    "training": (["training"], ["bf16"]),
    "engine": (["dynamic_engine"], ["bf16"]),
    "ModelOpt": (["modelopt"], ["bf16"]),
    "contract": (["contract", "inference"], ["fp32", "bf16"]),
    "layouts": (["gpu", "layouts", "audit", "also", "downstream"], ["fp32", "bf16"]),
    "demo": (["property", "examples", "demo"], ["fp32", "bf16"]),
}


def start(order: int, command: list[str], tree: Path, log: Path) -> subprocess.Popen:
    """Start pytest; every other run takes the GPUs in the other order, as most need only two."""
    gpus = subprocess.check_output(["nvidia-smi", "--list-gpus"], text=True).count("GPU ")
    numbers = [str((number + 2 * order) % gpus) for number in range(gpus)]
    path = [str(tree), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    variables = {
        "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": ",".join(numbers),
        "PYTHONWARNINGS": "ignore",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "EXAMPLES": os.environ.get("EXAMPLES", "50"),
    }
    return subprocess.Popen(
        command,
        cwd=HERE.parent,
        env={**os.environ, **variables},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def run(order: int, tree: Path, suite: str, dtype: str, into: Path, end: float) -> bool:
    """Run a suite unless it ran before; interrupt it at the end of the time.

    Returns:
        bool: whether it ran to its end, and nothing failed.
    """
    report = into / f"{tree.name} {suite} {dtype}.xml"
    if not report.exists():
        if time.monotonic() > end - 30:
            return False
        tests = [str(HERE / f"distributed/test_{name}.py") for name in SUITES[suite][0]]
        partial = report.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-rfEs", f"--junitxml={partial}", *tests]
        command += ["--bf16"] * (dtype == "bf16")
        process = start(order, command, tree, report.with_suffix(".log"))
        try:
            process.wait(timeout=end - time.monotonic())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        if process.returncode not in (0, 1):  # it was cut off, or died
            print(f"{report.stem}: not finished, see its log", flush=True)
            return False
        partial.rename(report)
    counts = count(report)
    print(f"{report.stem}: {dict(counts)}", flush=True)
    return not counts["failed"]


def count(report: Path) -> collections.Counter:
    """Count how the tests of a report ended, those skipped by their reason."""
    counts: collections.Counter = collections.Counter(passed=0, failed=0)
    for case in xml.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            counts[skipped.get("message").splitlines()[0]] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        else:
            counts["passed"] += 1
    return counts


def table(into: Path) -> str:
    """Make a row of each report."""
    rows = [("tests", "megatron-core", "dtype", "passed", "failed", "skipped, because")]
    rows.append(("---",) * len(rows[0]))
    for report in sorted(into.glob("*.xml")):
        tree, suite, dtype = re.fullmatch(r"(\S+) (.*) (\S+)", report.stem).groups()
        counts = count(report)
        passed, failed = counts.pop("passed"), counts.pop("failed")
        reasons = "; ".join(f"{number}: {reason}" for reason, number in counts.most_common())
        rows.append((suite, tree, dtype, str(passed), str(failed), reasons))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="folder of reports and logs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which to end")
    parser.add_argument("--at-once", type=int, default=6, metavar="N", help="runs that share GPUs")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    runs = [
        (tree, suite, dtype)
        for suite in arguments.suites
        for dtype in SUITES[suite][1]
        for tree in sorted(arguments.trees.iterdir())
    ]
    with ThreadPoolExecutor(arguments.at_once) as threads:
        futures = [
            threads.submit(run, order, *each, arguments.into, end)
            for order, each in enumerate(runs)
        ]
    good = [future.result() for future in futures]
    print(table(arguments.into))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
