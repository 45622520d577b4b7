# SPDX-License-Identifier: Apache-2.0
"""Run the contract on every release of megatron-core, in both forms.

Each release is fetched by pip and unpacked beside the environment's torch; the source form is a
copy of it with `megatron-sp-fix diff` applied. Python 3.12, where every release installs.

Example:
    python tests/matrix.py --releases 0.12.0 0.19.2
    python tests/matrix.py --write
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = ROOT / ".cache" / "matrix"
PAGE = ROOT / "docs" / "releases.md"
RELEASES = (
    *("0.12.0", "0.12.1", "0.12.2", "0.12.3", "0.13.0", "0.13.1", "0.14.0"),
    *("0.15.0", "0.15.1", "0.15.2", "0.15.3", "0.16.0", "0.16.1", "0.17.0", "0.17.1"),
    *("0.18.0", "0.18.2", "0.19.0", "0.19.2"),
)
FORMS = ("runtime", "source")
#: What a release does with a model that it cannot build without Transformer Engine: run with it, by
#: `--probe`, on two GPUs (docs/gpu.md).
WITH_ENGINE = {
    **{(f"0.12.{last}", "hybrid"): "broken" for last in range(4)},
    ("main", "mtp"): "right, keeps 2 x",  # at d98e8a64
}
#: A change of any of these calls for the whole matrix.
WATCHED = ("embedding.py", "patching.py", "sites.py", "source.py", "upstream_tests/core.py")


def digest() -> str:
    """Hash the files that decide what each release does."""
    package = ROOT / "megatron_sp_fix"
    return hashlib.sha256(b"".join((package / name).read_bytes() for name in WATCHED)).hexdigest()


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True, **options
    )


def must(*command, **options):
    done = run(*command, **options)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def fetch(release: str) -> Path:
    """Unpack a release, once."""
    tree = CACHE / release
    if not tree.is_dir():
        partial = CACHE / f"{release}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", partial)
        must(*pip, f"megatron-core=={release}")
        partial.rename(tree)
    return tree


def patch(tree: Path) -> Path:
    """Copy a tree and apply the diff to it; check that it can be taken back to the byte."""
    copy = CACHE / f"{tree.name}-source"
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "megatron").mkdir(parents=True)
    shutil.copytree(tree / "megatron/core", copy / "megatron/core")
    diff = (sys.executable, "-m", "megatron_sp_fix", "diff", "--root", copy)
    change = copy.with_suffix(".diff")
    change.write_text(must(*diff), newline="")
    must("git", "init", "-q", cwd=copy)
    for arguments in (["--check"], [], ["-R", "--check"]):
        must("git", "apply", *arguments, change, cwd=copy)
    if must(*diff):
        raise SystemExit(f"{copy}: a second diff is not empty")
    return copy


def environment(tree: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}",
        "PYTHONWARNINGS": "ignore",
        # Where nvcc is present without a GPU, 0.15 compiles at import.
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0"),
    }


def suite(tree: Path, workers: str) -> tuple[int, int, int]:
    """Run the contract; return how many tests passed, failed and do not apply."""
    report = CACHE / f"{tree.name}.xml"
    report.unlink(missing_ok=True)
    pytest = (sys.executable, "-m", "pytest", "-q", "-n", workers, f"--junitxml={report}")
    names = ["contract", "inference", *(["property"] if tree.name == RELEASES[-1] else [])]
    tests = [HERE / f"distributed/test_{name}.py" for name in names]
    done = run(*pytest, *tests, cwd=ROOT, env={"EXAMPLES": "500", **environment(tree)})
    if not report.is_file():
        raise SystemExit(f"{tree}: {done.stdout}{done.stderr}")
    counts = next(iter(xml.parse(report).getroot())).attrib
    failed, skipped = int(counts["failures"]) + int(counts["errors"]), int(counts["skipped"])
    if failed:
        print(done.stdout, file=sys.stderr)
    return int(counts["tests"]) - failed - skipped, failed, skipped


def bits(kind: str) -> str:
    """Hash every bit of a patched tower's step on this rank."""
    import megatron_sp_fix
    from megatron_sp_fix.demo import models

    try:
        _, tower = models.pair(kind)
    except Exception:  # needs Transformer Engine
        return "-"
    with megatron_sp_fix.applied():
        out = models.step(tower, models.batch())
    parts = (f"{name}{value.cpu().numpy().tobytes()!r}" for name, value in sorted(out.items()))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def probe() -> dict:
    """In a process of its own: what the release does by itself, and the fix's bits."""
    sys.path.insert(0, str(HERE))
    import matrix

    from megatron_sp_fix import status
    from megatron_sp_fix.demo import table
    from megatron_sp_fix.demo.ranks import Ranks

    alone, same = {}, {}
    with Ranks(2, tp=2) as ranks:
        for kind in table.KINDS:
            rows = ranks.run(table.measure, kind, 16)[0]
            if not rows[1:]:
                alone[kind] = "needs TE"
            elif not all(rows[1]["same"].values()):
                alone[kind] = "broken"
            else:
                alone[kind] = f"right, keeps {rows[1]['bytes kept'] // rows[0]['bytes kept']} x"
            same[kind] = ranks.run(matrix.bits, kind)
    single = [site.native for site in status().sites if site.name.endswith("single_position")]
    alone["single"] = {"no shard": "broken"}.get(single[0], single[0]) if single else "n/a"
    return {"alone": alone, "bits": same}


def measure(tree: Path) -> dict:
    command = (sys.executable, Path(__file__), "--probe")
    return json.loads(must(*command, cwd=ROOT, env=environment(tree)).splitlines()[-1])


def run_form(tree: Path, form: str, workers: str) -> tuple[tuple[int, int, int], dict]:
    place = tree if form == "runtime" else patch(tree)
    return suite(place, workers), measure(place)


def row(name: str, tree: Path, workers: str) -> tuple[list[str], bool]:
    """Run both forms of a release side by side: two pools of ranks keep two cores busy."""
    with ThreadPoolExecutor(len(FORMS)) as threads:
        results = list(threads.map(lambda form: run_form(tree, form, workers), FORMS))
    (_, runtime), (_, source) = results
    good = all(passed > 0 and not failed for (passed, failed, _), _ in results)
    same = runtime["bits"] == source["bits"]
    for key, value in runtime["alone"].items():
        if value == "needs TE" and (name, key) in WITH_ENGINE:
            runtime["alone"][key] = f"{WITH_ENGINE[name, key]} ¹"
    cells = [runtime["alone"][key] for key in ("gpt", "hybrid", "mtp", "single")]
    cells += [f"{passed} passed, {failed} failed, {na} n/a" for (passed, failed, na), _ in results]
    return [name, *cells, "yes" if same else "NO"], good and same


HEADER = (
    *("release", "GPT", "hybrid", "MTP training", "MTP speculative step"),
    *("runtime form", "source form", "same bits"),
)


def page(rows: list[list[str]], commit: str) -> str:
    import torch

    lines = ["| " + " | ".join(line) + " |" for line in (HEADER, ["---"] * len(HEADER), *rows)]
    return f"""# Releases

What each release of megatron-core does with a standalone tower by itself, and the contract (with
inference) on it in both forms of this fix. Written by `python tests/matrix.py --write`.

Columns two to five are the release unpatched, at TP 2: "broken", or "right" with the bytes that the
decoder's input keeps for backward, as a multiple of a plain LM's; the last of them, MTP's
speculative step, is read from the source, not run. "¹": the model cannot be built without
Transformer Engine, and was run with it, over NCCL, by hand (`--probe`). "n/a": tests of what a
release does not have (no speculative step before 0.17, no padding mask before 0.16, and so on) or
of what only a GPU has. "same bits": the towers' logits, loss and gradients are bitwise the same in
both forms.

{chr(10).join(lines)}

{commit}Python {sys.version.split()[0]}, torch {torch.__version__}, gloo on CPU ranks,
TP 2 and 4; on the newest release also 500 examples of the property test.

Digest of {", ".join(WATCHED)}: `{digest()}`
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--releases", nargs="+", default=RELEASES, metavar="X.Y.Z")
    parser.add_argument("--main", type=Path, metavar="PATH", help="a checkout of Megatron-LM too")
    parser.add_argument("--workers", default="0", help="of pytest-xdist, for each form")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--due", action="store_true", help="all releases if the fix has changed")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(json.dumps(probe()))
        return 0
    if arguments.due and PAGE.is_file():
        recorded = re.search(r"`([0-9a-f]{64})`", PAGE.read_text())
        if recorded and recorded[1] == digest():
            print("the fix and the call sites are those of docs/releases.md: oldest and newest")
            arguments.releases = (RELEASES[0], RELEASES[-1])
    CACHE.mkdir(parents=True, exist_ok=True)
    started, good, commit = time.monotonic(), True, ""
    trees = [(release, fetch(release)) for release in arguments.releases]
    if arguments.main:
        commit = must("git", "-C", arguments.main, "rev-parse", "HEAD").strip()
        trees.append(("main", arguments.main))
        commit = f"main is Megatron-LM commit `{commit}`. "
    rows = {}
    if arguments.write and digest() in PAGE.read_text():  # go on with what ran of the same fix
        lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines()]
        rows = {line[0]: line for line in lines if line[0] in (*RELEASES, "main")}
        commit = commit or "".join(re.findall(r"main is .*?`\. ", PAGE.read_text()))
    for name, tree in trees:
        rows[name], fine = row(name, tree, arguments.workers)
        good &= fine
        print(f"[{time.monotonic() - started:5.0f} s] " + " | ".join(rows[name]), flush=True)
        if arguments.write:
            order = [rows[name] for name in (*RELEASES, "main") if name in rows]
            PAGE.write_text(page(order, commit))
    print("the matrix holds" if good else "THE MATRIX DOES NOT HOLD")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
