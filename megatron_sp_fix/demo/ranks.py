# SPDX-License-Identifier: Apache-2.0
"""A pool of processes that act as ranks: over gloo on CPUs, or NCCL where each has a GPU."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class RankError(RuntimeError):
    """A function failed on some rank: first line what failed, below it every rank's traceback."""


def setup(rank: int, ranks: int, store: str, tp: int = 1, **sizes: Any) -> None:
    """Make this process a rank: process groups, device and random state.

    Over NCCL if this machine has a GPU for each rank, else over gloo. `store` is an ``init_method``
    of torch.distributed, `sizes` are arguments of megatron-core's ``initialize_model_parallel``.
    """
    import torch

    from megatron.core import parallel_state, tensor_parallel

    gpu = torch.cuda.device_count() >= ranks
    if gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        # megatron-core allocates what a collective fills on "the current CUDA device".
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", init_method=store, rank=rank, world_size=ranks
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, **sizes)
    if gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
    else:
        # The only tracker that does not ask a GPU for its state; its fork() leaves the CPU's alone.
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


class Ranks:
    """Processes that run functions as so many ranks; a context manager.

    The layout is that of :func:`setup`: ``with Ranks(2, tp=2) as ranks: ranks.run(function, 16)``.
    """

    def __init__(self, size: int, **layout: Any) -> None:
        cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not os.path.exists("/dev/nvidia0")
        # One import of torch and megatron-core, then a fork a rank; CUDA does not survive a fork.
        self._context: Any = multiprocessing.get_context("forkserver" if cpu else "spawn")
        if cpu:
            self._context.set_forkserver_preload([f"{__package__}.models"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of each package that is not installed
        self._size, self._layout = size, layout
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=1)
            process.kill()
            process.join()
        if self._pipes:
            self._folder.cleanup()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-sp-fix-")
        # Ctrl-C is for this process, which then ends the others: they inherit that it is ignored.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._context.get_start_method() == "forkserver":
            forkserver.ensure_running()
            signal.signal(signal.SIGINT, handler)  # for the seconds in which it imports torch
        for rank in range(self._size):
            pipe, theirs = self._context.Pipe()
            arguments = (theirs, self._folder.name, rank, self._size, self._layout)
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        signal.signal(signal.SIGINT, handler)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call a function on every rank at once.

        Args:
            function: importable by name in another process.
            args: its arguments, picklable.
            timeout: seconds for the slowest rank, and more where the machine is busy.

        Returns:
            list: the results, by rank.

        Raises:
            RankError: the function raised on some rank, or took too long, or a process died. All
                processes are ended, for a collective may be half done; the next call starts others.
        """
        if not self._pipes:
            self._start()
        for connection in self._pipes:
            with contextlib.suppress(OSError):  # it died, which is found below
                connection.send_bytes(pickle.dumps((function, args)))
        waiting: dict[Any, int] = dict(zip(self._pipes, range(self._size)))
        replies: dict[int, tuple[str, Any]] = {}
        while waiting and timeout > 0:
            began = time.monotonic()
            for pipe in wait(list(waiting), 1):
                rank = waiting.pop(pipe)
                try:
                    replies[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    replies[rank] = ("the process died; out of memory? try fewer ranks", None)
                if replies[rank][0]:
                    timeout = min(timeout, 5.0)  # the others may wait for this one, for ever
            # Where twice as much wants to run as there are cores, a second counts half.
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            timeout -= (time.monotonic() - began) / min(max(1.0, load), 5.0)
        for rank in waiting.values():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)  # it writes its stacks
            stacks = Path(self._folder.name, f"stacks{rank}")
            told = stacks.read_text(encoding="utf-8") if stacks.exists() else "it had not started"
            replies[rank] = (f"no answer in time\n{told}", None)
        errors: dict[str, list[str]] = {}
        for rank, (error, _) in sorted(replies.items()):
            errors.setdefault(error, []).append(str(rank))
        if errors.keys() != {""}:
            self.__exit__()
            raise RankError(
                "\n".join(f"rank {', '.join(on)}: {error}" for error, on in errors.items() if error)
            )
        return [replies[rank][1] for rank in range(self._size)]


def _serve(pipe: Connection, folder: str, rank: int, size: int, layout: dict[str, Any]) -> None:
    """Be a rank, and answer the calls that come through the pipe, until it closes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even if stuck, end with the pool
    if not os.path.isdir(folder):  # Ctrl-C came while the pool started its ranks
        return
    # Its handler is C and answers at once; one in Python would wait for a collective to return.
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/stacks{rank}", "w"))  # noqa: SIM115
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of a job that this is no part of
        os.environ.pop(variable, None)
    ready = False
    try:
        while True:
            call = pipe.recv_bytes()
            try:
                if not ready:
                    setup(rank, size, f"file://{folder}/store", **layout)
                    ready = True
                function, args = pickle.loads(call)
                reply = pickle.dumps(("", function(*args)))
            except BaseException as failure:
                brief = traceback.format_exception_only(failure)[0].splitlines()[0]
                reply = pickle.dumps((f"{brief}\n{traceback.format_exc()}", None))
            pipe.send_bytes(reply)
    except (EOFError, OSError):
        os._exit(0)  # the pool closed the pipe; an ordinary exit would wait for gloo's threads
