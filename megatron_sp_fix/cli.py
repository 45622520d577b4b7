# SPDX-License-Identifier: Apache-2.0
"""The command line: ``megatron-sp-fix`` and ``python -m megatron_sp_fix``."""

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Optional

from . import StartupError, UnsupportedMegatronError, __version__, startup, status
from .run import UsageError, prepare

__all__ = ["main"]

_NATIVE = {
    "none": "no shard (the bug)",
    "native": "megatron-core's own scatter",
    "source": "this fix, in the source",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; the process's by default.

    Returns:
        int: 0, or 1 for a finding; usage errors exit with 2.
    """
    parser = _Parser(
        prog="megatron-sp-fix",
        description="Run a multimodal model's language tower alone under sequence parallelism.",
        epilog="example: megatron-sp-fix demo --tp 2",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "status",
        help="show the installed megatron-core and its call sites",
        description="Show the installed megatron-core, and for each call site what it does by "
        "itself and whether it is patched.",
        epilog="example: megatron-sp-fix status --json",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_status)

    command = commands.add_parser(
        "demo",
        help="show the bug and the fix on real ranks",
        description="Build a plain LM and a tower from the same weights, run both with sequence "
        "parallelism on, and compare them bitwise. Uses torchrun's ranks, or starts its own: on "
        "GPUs if there is one for each, else on CPUs.",
        epilog="example: torchrun --nproc-per-node 2 -m megatron_sp_fix demo",
    )
    command.add_argument("--tp", type=int, default=2, metavar="N", help="TP size (default: 2)")
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "run",
        help="run a script or a module with the fix",
        usage="megatron-sp-fix run [-h] (SCRIPT | -m MODULE) [ARG ...]",
        description="Run a script, or a module as `python -m` does, with the fix applied as "
        "megatron-core is imported. Everything after its name is passed on to it. Processes that "
        "it forks have the fix; those that it spawns do not: see enable.",
        epilog="example: torchrun --nproc-per-node 8 -m megatron_sp_fix run train.py --tp 8",
    )
    # For the help alone: argparse would take the script's own options for this one's.
    command.add_argument("script", metavar="SCRIPT", help="a file")
    command.add_argument("-m", metavar="MODULE", help="a module")

    command = commands.add_parser(
        "enable",
        help="give the fix to every process of this environment",
        description="Put one file into this environment's site-packages, by which every Python "
        "process that starts, Ray's workers included, gets the fix as it imports megatron-core. "
        "MEGATRON_SP_FIX=0 switches it off for a process; MEGATRON_SP_FIX=strict makes it raise "
        "where it cannot be applied, instead of logging an error.",
        epilog="example: megatron-sp-fix enable && megatron-sp-fix status",
    )
    command.set_defaults(run=_enable)

    command = commands.add_parser(
        "disable",
        help="take back what enable did",
        description="Remove the file that `enable` put into this environment's site-packages. "
        "Processes that run keep the fix.",
        epilog="example: megatron-sp-fix disable",
    )
    command.set_defaults(run=_disable)

    command = commands.add_parser(
        "audit",
        help="list the towers in a model, covered or not",
        description="Apply the fix, call a function that sets up the process groups and builds a "
        "model, and list its language models: whether each is a tower, whether the fix covers it, "
        "and why. Exits with 1 if one is not covered.",
        epilog="example: megatron-sp-fix audit my_job.models:build",
    )
    command.add_argument("factory", metavar="MODULE:FACTORY", help="a function of no arguments")
    command.set_defaults(run=_audit)

    command = commands.add_parser(
        "diff",
        help="print the fix as a patch of a megatron-core source tree",
        description="Print a unified diff that puts the fix into a megatron-core source tree: an "
        "installed package, an unpacked wheel or a Megatron-LM checkout. Writes nothing there.",
        epilog="example: megatron-sp-fix diff --root Megatron-LM | git -C Megatron-LM apply",
    )
    command.add_argument(
        "--root",
        type=Path,
        metavar="PATH",
        help="the folder that holds megatron/core (default: the installed package's)",
    )
    command.add_argument(
        "--format",
        choices=("plain", "mail"),
        default="plain",
        help="mail is for git am, signed off by git's user",
    )
    command.set_defaults(run=_diff)

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["run"] and argv[1:] not in (["-h"], ["--help"]):
            start = prepare(argv[1:])
        else:
            arguments = parser.parse_args(argv)
            result: int = arguments.run(arguments)
            return result
    except UsageError as error:
        print(f"megatron-sp-fix: {error}", file=sys.stderr)
        return 2
    except (UnsupportedMegatronError, StartupError) as error:
        print(f"megatron-sp-fix: {error}", file=sys.stderr)
        return 1
    start()  # out here, since its exceptions are its own
    return 0


def _status(arguments: argparse.Namespace) -> int:
    found = status()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    print(f"megatron-core {found.version} at {found.path}")
    off = _off()
    if found.enabled:
        but = f", but not in this one: {off}" if off else ""
        print(f"enabled for every process by {found.enabled}{but}")
    else:
        print("not enabled for every process")
    otherwise = "not patched" if off else "patched on import"
    width = max(len(site.name) for site in found.sites)
    for site in found.sites:
        by = f" (by {', '.join(site.by)})" if site.by else ""
        patched = "patched" if site.patched else otherwise
        print(f"  {site.name.ljust(width)}  by itself: {_NATIVE[site.native]}; {patched}{by}")
    return 0


def _off() -> str:
    """Why this process will not be patched by the import hook; empty if it will."""
    mode = os.environ.get(startup.VARIABLE, "")
    if mode not in startup.ON:
        return f"{startup.VARIABLE}={mode}"
    return "" if startup.installed() else "it has not read that"


def _enable(arguments: argparse.Namespace) -> int:
    print(f"every process of this environment has the fix now, by {startup.enable()}")
    return 0


def _disable(arguments: argparse.Namespace) -> int:
    file = startup.disable()
    print(f"removed {file}" if file else "nothing to remove: it was not enabled")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from . import apply, audit

    module, _, factory = arguments.factory.partition(":")
    if not factory:
        raise UsageError(f"{arguments.factory!r} is not MODULE:FACTORY")
    sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{arguments.factory}: {error}") from error
    apply()
    towers = audit(build())
    if not towers:
        print("no language model found")
        return 1
    for tower in towers:
        mark = "covered" if tower.covered else "NOT COVERED"
        embedding = tower.embedding or "no embedding"
        print(f"{tower.name or '(model)'}: {tower.cls}, {embedding}, {tower.kind}")
        print(f"  {mark}: {tower.reason}")
    return 0 if all(tower.covered for tower in towers) else 1


def _diff(arguments: argparse.Namespace) -> int:
    from .sites import installed_root
    from .source import diff, mail, signer

    root = arguments.root or installed_root()
    try:
        text = mail(root, signer(root)) if arguments.format == "mail" else diff(root)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not text:
        print(f"megatron-sp-fix: {root} carries the fix already", file=sys.stderr)
    # As bytes: a text stream would change the line ends of a file that has \r\n.
    sys.stdout.buffer.write(text.encode("utf-8"))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import demo

    try:
        return demo(arguments.tp)
    except ValueError as error:
        raise UsageError(str(error)) from error
