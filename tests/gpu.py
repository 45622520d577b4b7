# SPDX-License-Identifier: Apache-2.0
"""Run the distributed suite on GPUs, with several releases of megatron-core: docs/gpu.md's table.

TREES has a folder for each release, named by it, with the package `megatron` in it. What ran to its
end before is not run again, so a run that was cut off goes on. Runs share the GPUs.

Example:
    python tests/gpu.py TREES --into RESULTS --seconds 540
    python tests/gpu.py TREES --into RESULTS --table
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
    "inference": (["dynamic_engine"], ["bf16"]),
    "ModelOpt": (["modelopt"], ["bf16"]),
    "contract": (["contract", "inference"], ["fp32", "bf16"]),
    "others": (
        ["gpu", "layouts", "audit", "also", "downstream", "demo", "examples", "property"],
        ["fp32", "bf16"],
    ),
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
        # Bitwise comparisons need kernels that repeat their bits.
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
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


def run(order: int, tree: Path, suite: str, dtype: str, into: Path, end: float) -> None:
    """Run a suite unless it ran before; interrupt it at the end of the time, for it to report."""
    report = into / f"{tree.name} {suite} {dtype}.xml"
    if report.exists() or time.monotonic() > end - 30:
        return
    tests = [str(HERE / f"distributed/test_{name}.py") for name in SUITES[suite][0]]
    partial = report.with_suffix(".partial")
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", f"--junitxml={partial}", *tests]
    process = start(
        order, command + ["--bf16"] * (dtype == "bf16"), tree, report.with_suffix(".log")
    )
    try:
        process.wait(timeout=end - time.monotonic())
        partial.rename(report)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"{report.stem}: {process.returncode}, {dict(count(report, partial))}", flush=True)


def count(*reports: Path) -> collections.Counter:
    """Count how the tests of the first of these reports that is there ended; skips by reason."""
    counts: collections.Counter = collections.Counter(passed=0, failed=0)
    for report in filter(Path.exists, reports):
        for case in xml.parse(report).iter("testcase"):
            skipped = case.find("skipped")
            if skipped is not None:
                counts[skipped.get("message").splitlines()[0]] += 1
            else:
                counts["passed" if not list(case.iter("failure")) else "failed"] += 1
        break
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", type=Path)
    parser.add_argument("--into", type=Path, required=True, help="folder of reports and logs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which to end")
    parser.add_argument("--at-once", type=int, default=6, metavar="N", help="runs that share GPUs")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--table", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    if not arguments.table:
        arguments.into.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + arguments.seconds
        runs = [
            (tree, suite, dtype)
            for suite in arguments.suites
            for dtype in SUITES[suite][1]
            for tree in sorted(arguments.trees.iterdir())
        ]
        with ThreadPoolExecutor(arguments.at_once) as threads:
            for order, each in enumerate(runs):
                threads.submit(run, order, *each, arguments.into, end)
    print(table(arguments.into))


if __name__ == "__main__":
    main()
