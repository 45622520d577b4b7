# SPDX-License-Identifier: Apache-2.0
"""The command line: ``megatron-sp-fix`` and ``python -m megatron_sp_fix``."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Optional

from . import UnsupportedMegatronError, __version__, apply, audit, hook, launch, sites, status

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")  # one line


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; the process's by default.

    Returns:
        int: 0, 1 for a finding or an error, 130 or 141 as after a signal. Usage errors exit with 2.
    """
    argv, command = list(sys.argv[1:] if argv is None else argv), []
    if argv[:1] == ["run"]:  # what follows its own options is not for argparse
        at = 1
        while at < len(argv) and argv[at].startswith("-") and argv[at] != "-m":
            at += 2 if argv[at] == "--also" else 1
        argv, command = argv[:at], argv[at:]
    parser = _Parser("megatron-sp-fix", description=sys.modules[__package__ or ""].__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    rows = parser.add_subparsers(metavar="COMMAND")
    for name, (call, options, example) in COMMANDS.items():
        row = rows.add_parser(name, help=call.__doc__, description=call.__doc__)
        row.epilog = f"example: megatron-sp-fix {example}"
        for option in options.split():
            row.add_argument(option, **OPTIONS[option])
        row.set_defaults(call=call, parser=row, command=command)
    arguments = parser.parse_args(argv)
    try:
        if not argv:
            parser.print_help()
        code: int = arguments.call(arguments) if argv else 0
        sys.stdout.flush()
    except (UnsupportedMegatronError, launch.StartupError) as error:
        return _say(error)
    except ValueError as error:  # what was asked for makes no sense
        arguments.parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nor is there anybody to read what is flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _say(what: object) -> int:
    print(f"megatron-sp-fix: {what}", file=sys.stderr)
    return 1


def _run(arguments: argparse.Namespace) -> int:
    """Start a command whose Python processes have the fix."""
    if arguments.path:
        print(launch.folder())
        return 0
    if not arguments.command:
        raise ValueError("name a command, a script, or -m and a module")
    launch.run(arguments.command, arguments.also)


def _enable(arguments: argparse.Namespace) -> int:
    """Give the fix to every Python process of this environment, by a file in site-packages."""
    print(f"wrote {launch.enable()}; in a new process:", flush=True)
    return subprocess.call([sys.executable, "-m", "megatron_sp_fix", "status", "--check"])


def _disable(arguments: argparse.Namespace) -> int:
    """Take back what enable did."""
    file = launch.disable()
    print(f"removed {file}" if file else "nothing to remove: it was not enabled")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    """Show what each call site of megatron-core does in a process like this one."""
    found = status(arguments.root)
    rows = found.sites
    hooked = not arguments.root and hook.in_force()
    if arguments.json:
        rest = {"hook": hooked, "sites": [row._asdict() for row in rows]}
        print(json.dumps({**found._asdict(), **rest}, indent=2))
    else:
        print(f"megatron-core {found.version} at {found.root}")
        print(*filter(None, [found.remark]), sep="\n", end="")
        print("import hook:", "patches each module as it is imported" if hooked else "none")
        for row in rows:
            by = f" (by {row.by})" if row.by else ""
            print(f"  {row.name:50} by itself: {row.native:11}  now: {row.state}{by}")
    right = ("patched", "this fix", "not imported") if hooked else ("patched", "this fix")
    wrong = ", ".join(row.name for row in rows if row.state not in right)
    remedy = "start it under `megatron-sp-fix run`, `enable` the fix, or patch the source by `diff`"
    if arguments.check and wrong:
        return _say(f"a process like this one would run unpatched: {wrong}; {remedy}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    """Show the bug and the fix on real ranks of this machine."""
    from .demo import demo

    return demo(arguments.tp, arguments.json)


def _audit(arguments: argparse.Namespace) -> int:
    """Apply the fix, build a model, and list its towers: covered or not."""
    module, _, name = arguments.factory.partition(":")
    if not name:
        raise ValueError(f"{arguments.factory} is not MODULE:FACTORY")
    sys.path.insert(0, "")
    apply()
    try:
        towers = audit(getattr(importlib.import_module(module), name)())
    except Exception as error:
        where = [
            f"{frame.filename}:{frame.lineno}: "
            for frame in traceback.extract_tb(error.__traceback__)
            if not {"importlib", "megatron_sp_fix"} & {*Path(frame.filename).parts}
        ]
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return _say(f"{arguments.factory}: {''.join(where[-1:])}{text}")
    for tower in towers:
        print(f"{tower.name or '(model)'}: {tower.cls}: {tower.verdict}: {tower.reason}")
    if not towers:
        return _say(f"{arguments.factory}: no language model of megatron-core in what it returned")
    return 0 if all(tower.covered for tower in towers) else 1


def _diff(arguments: argparse.Namespace) -> int:
    """Print the fix as a patch of a megatron-core source tree."""
    from . import source

    root = arguments.root or sites.installed_root()
    mail = arguments.format == "mail"
    text = source.mail(root, source.signer(root)) if mail else source.diff(root)
    if not text:
        _say(f"{root} has the fix in its source already")
    sys.stdout.buffer.write(text.encode("utf-8"))  # a text stream would change \r\n
    return 0


OPTIONS: dict[str, dict[str, Any]] = {
    "command": {
        "nargs": "*",
        "help": "and its arguments; this Python runs SCRIPT.py and -m MODULE",
    },
    "--also": {"action": "append", "default": [], "help": "MODULE:CLASS[.METHOD] of yours, too"},
    "--path": {"action": "store_true", "help": "print the folder to put on PYTHONPATH"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--check": {"action": "store_true", "help": "exit with 1 unless every site is right"},
    "--root": {"type": Path, "help": "the folder that holds megatron/core (default: installed)"},
    "--tp": {"type": int, "default": 2, "metavar": "N", "help": "TP size (default: 2)"},
    "--format": {"choices": ("plain", "mail"), "default": "plain", "help": "mail: for git am"},
    "factory": {"metavar": "MODULE:FACTORY", "help": "builds a model, without arguments"},
}
#: By name: what it calls, whose docstring is its help; its options; an example.
COMMANDS = {
    "run": (_run, "--also --path command", "run torchrun --nproc-per-node 8 train.py"),
    "enable": (_enable, "", "enable"),
    "disable": (_disable, "", "disable"),
    "status": (_status, "--check --json --root", "run megatron-sp-fix status --check"),
    "demo": (_demo, "--tp --json", "demo --tp 2"),
    "audit": (_audit, "factory", "audit my_job.models:build"),
    "diff": (_diff, "--root --format", "diff --root Megatron-LM | git -C Megatron-LM apply"),
}
