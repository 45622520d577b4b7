# SPDX-License-Identifier: Apache-2.0
"""A pool of processes that act as ranks: over gloo on CPUs, or NCCL where each has a GPU."""

import contextlib
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: Seconds that the other ranks have once one failed: they may wait for it in a collective.
GRACE = 5.0


class RankError(RuntimeError):
    """A function failed on some rank: first line what failed, below it every rank's traceback."""


def setup(rank: int, ranks: int, store: str, *, tp: int = 1, **sizes: Any) -> None:
    """Make this process a rank: process groups, device and random state.

    Args:
        rank: this process's rank.
        ranks: the number of ranks; NCCL is used if this machine has a GPU for each, else gloo.
        store: ``init_method`` of ``torch.distributed.init_process_group``.
        tp: tensor parallel size.
        sizes: more arguments of megatron-core's ``initialize_model_parallel``.
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
    """Processes that run functions as the ranks of one layout; a context manager.

    Args:
        size: how many ranks.
        setup: what makes each process a rank, importable by name; arguments as :func:`setup`.
        layout: keywords of `setup`.

    Example:
        >>> with Ranks(2, tp=2) as ranks:
        ...     ranks.run(function, 16)  # calls function(16) on both; returns both results
    """

    def __init__(self, size: int, setup: Callable[..., None] = setup, **layout: Any) -> None:
        cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not os.path.exists("/dev/nvidia0")
        # One import of torch and megatron-core, then a fork a rank; CUDA does not survive a fork.
        self._context: Any = multiprocessing.get_context("forkserver" if cpu else "spawn")
        if cpu:
            self._context.set_forkserver_preload([f"{__package__}.models"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of each package that is not installed
        self._size, self._setup, self._layout = size, setup, layout
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
        # Ctrl-C is for the parent, which then ends the others: they inherit that it is blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for rank in range(self._size):
            pipe, theirs = self._context.Pipe()
            Path(self._folder.name, f"stacks{rank}").touch()  # to read, however early it dies
            setup = functools.partial(
                self._setup, rank, self._size, f"file://{self._folder.name}/store", **self._layout
            )
            arguments = (theirs, f"{self._folder.name}/stacks{rank}", setup)
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

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
                processes are ended then, since a collective may be half done; the next call starts
                others.
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
                    timeout = min(timeout, GRACE)
            # Where twice as much wants to run as there are cores, a second counts half.
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            timeout -= (time.monotonic() - began) / max(1.0, load)
        for rank in waiting.values():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)  # it writes its stacks
            stacks = Path(self._folder.name, f"stacks{rank}").read_text(encoding="utf-8")
            replies[rank] = (f"no answer in time\n{stacks}", None)
        errors: dict[str, list[str]] = {}
        for rank, (error, _) in sorted(replies.items()):
            errors.setdefault(error, []).append(str(rank))
        if errors.keys() != {""}:
            self.__exit__()
            raise RankError(
                "\n".join(f"rank {', '.join(on)}: {error}" for error, on in errors.items() if error)
            )
        return [replies[rank][1] for rank in range(self._size)]


def _serve(pipe: Connection, stacks: str, setup: Callable[[], None]) -> None:
    """Be a rank, and answer the calls that come through the pipe, until it closes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even if stuck, end with the pool
    # Its handler is C and answers at once; one in Python would wait for a collective to return.
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"))  # noqa: SIM115
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of a job that this is no part of
        os.environ.pop(variable, None)
    ready = False
    try:
        while True:
            call = pipe.recv_bytes()
            try:
                if not ready:
                    setup()
                    ready = True
                function, args = pickle.loads(call)
                reply = pickle.dumps(("", function(*args)))
            except BaseException as failure:
                brief = traceback.format_exception_only(failure)[0].splitlines()[0]
                reply = pickle.dumps((f"{brief}\n{traceback.format_exc()}", None))
            pipe.send_bytes(reply)
    except (EOFError, OSError):
        os._exit(0)  # the pool closed the pipe; an ordinary exit would wait for gloo's threads
