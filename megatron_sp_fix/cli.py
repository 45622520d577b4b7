# SPDX-License-Identifier: Apache-2.0
"""The command line: ``megatron-sp-fix`` and ``python -m megatron_sp_fix``."""

import argparse
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Optional

from . import NotCoveredError, __version__, apply, audit, hook, launch, sites, status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")  # one line


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command: 0, 1 for a finding or an error, 2 for wrong usage, or as after a signal."""
    parser = _Parser("megatron-sp-fix", description=sys.modules[__package__ or ""].__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(call=lambda args: parser.print_help())
    rows = parser.add_subparsers(metavar="COMMAND")
    for name, (call, options, example) in COMMANDS.items():
        row = rows.add_parser(name, help=call.__doc__, description=call.__doc__)
        row.epilog = f"example: megatron-sp-fix {example}"
        for option in options.split():
            row.add_argument(option, **OPTIONS[option])
        row.set_defaults(call=call, name=name)
    args = parser.parse_args(argv)
    try:
        try:
            return args.call(args) or 0
        finally:
            sys.stdout.flush()
    except (NotCoveredError, sites.UnsupportedMegatronError) as error:
        hook.say(error)
        return 1
    except ValueError as error:  # what was asked for makes no sense
        hook.say(f"{error}; see megatron-sp-fix {args.name} --help")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nor is there anybody to read what is flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        hook.say(f"{error}: is it there, and yours to change?")
        return 1


def _run(args: argparse.Namespace) -> None:
    """Start a command whose Python processes have the fix."""
    if args.path:
        print(launch.FOLDER)
        return
    command = args.command if args.m is None else ["-m", *args.m, *args.command]
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise ValueError("name a command, a script, or -m and a module")
    if command[0] == "-m" or command[0].endswith(".py"):  # by this Python, with the same options
        if sys.flags.ignore_environment or sys.flags.no_site:
            raise ValueError("run needs PYTHONPATH and site: start python without -I, -E and -S")
        options = sys.orig_argv[1 : -len(sys.argv)]  # "-m" is of `python -m megatron_sp_fix run`
        command = [sys.executable, *(options[:-1] if options[-1:] == ["-m"] else options), *command]
    paths = filter(None, [launch.FOLDER, os.environ.get("PYTHONPATH")])
    names = filter(None, [os.environ.get("MEGATRON_SP_FIX_ALSO"), *args.also])
    changes = {"PYTHONPATH": os.pathsep.join(paths), "MEGATRON_SP_FIX_ALSO": ",".join(names)}
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and so by what it becomes
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, {**os.environ, **changes})
    except OSError as error:
        raise ValueError(f"cannot run {command[0]}: {error.strerror}") from error


def _enable(args: argparse.Namespace) -> None:
    """Give the fix to every Python process of this environment, by a file in site-packages."""
    print(f"wrote {launch.enable()}; in a new process:", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "megatron_sp_fix", "status", "--check"])


def _disable(args: argparse.Namespace) -> None:
    """Take back what enable did."""
    file = launch.disable()
    print(f"removed {file}" if file else "nothing to remove: it was not enabled")


def _status(args: argparse.Namespace) -> None:
    """Show what each call site of megatron-core does in a process like this one."""
    found = status(args.root)
    hooks = not args.root and any(isinstance(f, hook.Finder) and not f.error for f in sys.meta_path)
    if args.json:
        rest = {"hook": hooks, "sites": [row._asdict() for row in found.sites]}
        print(json.dumps({**found._asdict(), **rest}, indent=2))
    else:
        print(found.remark or f"megatron-core {found.version} at {found.root}")
        print("import hook:", "patches each module as it is imported" if hooks else "none")
        for row in found.sites:
            by = row.by and f" (by {row.by})"
            print(f"  {row.name:50} by itself: {row.native:11}  now: {row.state}{by}")
    right = ("patched", "this fix", "not imported") if hooks else ("patched", "this fix")
    wrong = ", ".join(row.name for row in found.sites if row.state not in right)
    what = args.root or "a process like this one"
    remedy = "start it under `megatron-sp-fix run`, `enable` the fix, or patch the source by `diff`"
    if args.check and wrong:
        raise NotCoveredError(f"{what} would run unpatched: {wrong}; {remedy}")


def _demo(args: argparse.Namespace) -> int:
    """Show the bug and the fix on real ranks of this machine."""
    from .demo import demo

    return demo(args.tp, args.json)


def _audit(args: argparse.Namespace) -> int:
    """Apply the fix, build a model (TP 2 or more: under torchrun), and list its towers."""
    module, _, name = args.factory.partition(":")
    if not name:
        raise ValueError(f"{args.factory} is not MODULE:FACTORY")
    sys.path.insert(0, "")
    apply()
    try:
        found = audit(getattr(importlib.import_module(module), name)())
    except Exception as error:
        folders = [os.path.dirname(file) + os.sep for file in (__file__, importlib.__file__)]
        ours = (*folders, "<frozen importlib")
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f"{f.filename}:{f.lineno}: " for f in frames if not f.filename.startswith(ours)]
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotCoveredError(f"{args.factory}: {''.join(theirs[-1:])}{text}") from error
    if not found:
        raise NotCoveredError(f"{args.factory}: no language model of megatron-core in its result")
    for tower in found:
        print(f"{tower.name or '(model)'}: {tower.cls}: {tower.verdict}: {tower.reason}")
    return 0 if all(tower.covered for tower in found) else 1


def _diff(args: argparse.Namespace) -> None:
    """Print the fix as a patch of a megatron-core source tree."""
    from . import source

    root = args.root or sites.installed_root()
    text = source.mail(root, source.signer(root)) if args.format == "mail" else source.diff(root)
    if not text:
        hook.say(f"{root} has the fix in its source already")
    sys.stdout.buffer.write(text.encode("utf-8"))  # a text stream would change \r\n


OPTIONS: dict[str, dict[str, Any]] = {
    "command": {"nargs": argparse.REMAINDER, "help": "with its arguments; this Python runs *.py"},
    "-m": {"nargs": argparse.REMAINDER, "help": "a module and its arguments for this Python"},
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
    "run": (_run, "--also --path -m command", "run torchrun --nproc-per-node 8 train.py"),
    "enable": (_enable, "", "enable"),
    "disable": (_disable, "", "disable"),
    "status": (_status, "--check --json --root", "run megatron-sp-fix status --check"),
    "demo": (_demo, "--tp --json", "demo --tp 2"),
    "audit": (_audit, "factory", "audit my_job.models:build"),
    "diff": (_diff, "--root --format", "diff --root Megatron-LM | patch -p1 -d Megatron-LM"),
}
