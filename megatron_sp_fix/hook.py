# SPDX-License-Identifier: Apache-2.0
"""Patches megatron-core's modules as they are imported; part of the start of every process.

Finders run under Python's import lock. One that imports could wait for an import of another thread
that waits for this lock. So all names are known up front, and imports follow once a module has run.
"""

from __future__ import annotations

import atexit
import os
import sys

TYPE_CHECKING = False  # type checkers take it for true; importing `typing` takes milliseconds
if TYPE_CHECKING:
    from typing import Any

MODULES = {  # those of `sites.SITES`, and ModelOpt's EAGLE-3
    *(f"megatron.core.models.{kind}.{kind}_model" for kind in ("gpt", "hybrid", "mamba")),
    "megatron.core.transformer.multi_token_prediction",
    "modelopt.torch.speculative.plugins.megatron_eagle",
}
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")


class Finder:
    """Finds these modules by the other finders, and patches each once it has run."""

    def __init__(self) -> None:
        self.mode = os.environ.get("MEGATRON_SP_FIX", "")
        self.also = tuple(filter(None, os.environ.get("MEGATRON_SP_FIX_ALSO", "").split(",")))
        self.names = MODULES | {name.partition(":")[0] for name in self.also}
        self.patched: list[str] = []  # as "Class.method"
        self.running, self.said = 0, False
        self.error: Exception | None = None
        if self.mode not in ("", "1", "warn"):  # under "0" this module is not loaded
            self.error = ValueError(f"MEGATRON_SP_FIX={self.mode} is none of 0, 1 and warn")
        for name in (n for n in self.also if ":" not in n or n.startswith("__main__:")):
            self.error = ValueError(f"--also {name} is no MODULE:CLASS of a module to import")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Find one of the modules, with a loader that patches it."""
        if name not in self.names:
            return None
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        self.names.remove(name)  # for now: a finder that asks all the others would come back here
        try:
            spec = next(filter(None, (f.find_spec(name, path, target) for f in finders)), None)
        finally:
            self.names.add(name)
        if spec and (loader := spec.loader):  # its own attribute is found before a method
            execute = loader.exec_module
            vars(loader)["exec_module"] = lambda module: self.run(loader, execute, module)
        return spec

    def run(self, loader: Any, execute: Any, module: Any) -> None:
        """Run a module, and patch it; a failure leaves all of megatron-core as it was."""
        vars(loader).pop("exec_module", None)
        self.running += 1
        try:
            execute(module)
        finally:
            self.running -= 1
        from megatron_sp_fix import patching

        if not self.error:
            try:
                methods = patching.apply_to(module.__name__, self.also)
                self.patched += [".".join(method.split(".")[-2:]) for method in methods]
                if not self.running:
                    self.check()
            except Exception as error:
                self.error = error
                patching.remove()
        if self.error and self.mode != "warn":
            raise self.error  # at each import, since somebody may have caught the first
        if self.error and self.names:
            say(f"off in this process: {self.error}")
            self.names.clear()

    def check(self) -> None:
        """Fail if another finder kept a module from this one; say once what is patched."""
        from megatron_sp_fix import patching

        found = patching.status()
        # What was patched may have been changed since, which is not this hook's matter.
        missed = {row.name for row in found.sites if row.state == "not patched"} - {*self.patched}
        if missed and not patching._removed:
            raise RuntimeError(
                f"{', '.join(sorted(missed))} not patched: an import hook in front of this one has "
                "loaded it without asking: import megatron-core before that hook is installed"
            )
        rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
        if self.patched and not self.said and rank == "0":
            names, remark = ", ".join(self.patched), found.remark and f"; {found.remark}"
            say(f"patched {names} in megatron-core {found.version} at {found.root}{remark}")
        self.said = True

    def check_at_exit(self) -> None:
        """End the process with 1 if it ran unpatched in silence."""
        try:
            loaded = [name for name in self.names if getattr(sys.modules.get(name), "__spec__", 0)]
            if loaded and not self.error:  # stubs in a job's own tests have no __spec__
                self.check()
            never = [name for name in self.also if name.partition(":")[0] not in sys.modules]
            if self.patched and never:
                say(f"--also {', '.join(never)}: not patched, since no such module was imported")
        except RuntimeError as error:
            say(error)
            sys.stdout.flush()
            if self.mode != "warn":
                os._exit(1)  # the only way to change the status by now


def install() -> None:
    """Patch what this process imports from now on."""
    finder = Finder()
    sys.meta_path.insert(0, finder)
    atexit.register(finder.check_at_exit)


def say(text: object) -> None:
    """Write a line on standard error, if it can be written: no job ends for want of it."""
    try:
        print(f"megatron-sp-fix: {text}", file=sys.stderr, flush=True)
    except Exception:  # a full disk, a closed pipe, a stand-in without `flush`
        return
