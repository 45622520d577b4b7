# SPDX-License-Identifier: Apache-2.0
"""A pool of processes that act as ranks: over gloo on CPUs, or NCCL where each has a GPU."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Ranks", "RankError", "setup", "teardown"]

#: Seconds that the other ranks have once one failed: they may wait for it in a collective.
GRACE = 10.0


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


def teardown() -> None:
    """Leave the process groups that :func:`setup` made, if there are any."""
    import torch

    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


class Ranks:
    """Processes that run functions as the ranks of a process group; a context manager.

    Args:
        size: how many processes.
        setup: what makes each a rank, importable by name; arguments as :func:`setup`.

    Example:
        >>> with Ranks(2) as ranks:
        ...     ranks.run(function, 16, tp=2)  # calls function(16) on both; returns both results
    """

    def __init__(self, size: int, setup: Callable[..., None] = setup) -> None:
        cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not os.path.exists("/dev/nvidia0")
        # One import of torch and megatron-core, then a fork a rank; CUDA does not survive a fork.
        self._context: Any = multiprocessing.get_context("forkserver" if cpu else "spawn")
        if cpu:
            self._context.set_forkserver_preload([f"{__package__}.models"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of each package that is not installed
        self.size = size
        self._setup = setup
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-sp-fix-")
        self._stores = 0
        self._start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self._folder.cleanup()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int = 0,
        timeout: float = 120,
        **layout: Any,
    ) -> list[Any]:
        """Call a function on every rank at once.

        Args:
            function: importable by name in another process.
            args: its arguments, picklable.
            ranks: how many ranks take part; all by default.
            timeout: seconds for the slowest rank, and more where the machine is busy; then all
                processes are ended and started anew.
            layout: keywords of :func:`setup`.

        Returns:
            list: the results, by rank.

        Raises:
            RankError: the function raised on some rank, or took too long, or a process died.
        """
        if not all(process.is_alive() for process in self._processes):
            self._stop()
            self._start()
        ranks = ranks or self.size
        if self._layout != (ranks, layout):
            self._layout = (ranks, layout)
            self._stores += 1
        store = f"file://{self._folder.name}/store{self._stores}"
        call = pickle.dumps((store, ranks, layout, function, args))
        # The others leave the groups they are in: NCCL ends one only when all of its ranks leave.
        leave = pickle.dumps((store, ranks, layout, None, ()))
        for rank, pipe in enumerate(self._pipes):
            pipe.send_bytes(call if rank < ranks else leave)
        replies = self._replies(timeout)
        errors: dict[str, list[str]] = {}
        for rank, (error, _) in sorted(replies.items()):
            if error:
                errors.setdefault(error, []).append(str(rank))
        if errors:
            self._layout = None  # a collective may have been left half done
            who = (f"rank {', '.join(on)} of {ranks}: {error}" for error, on in errors.items())
            raise RankError("\n".join(who))
        return [replies[rank][1] for rank in range(ranks)]

    def _replies(self, left: float) -> dict[int, tuple[str, Any]]:
        """Wait for each rank's error and result; end all if some do not answer in time."""
        replies: dict[int, tuple[str, Any]] = {}
        waiting: dict[Any, int] = dict(zip(self._pipes, range(self.size)))
        while waiting and left > 0:
            began = time.monotonic()
            for pipe in wait(list(waiting), 1):
                rank = waiting.pop(pipe)
                try:
                    replies[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(1)
                    code = self._processes[rank].exitcode
                    replies[rank] = (f"the process died, exit code {code}", None)
                if replies[rank][0]:
                    left = min(left, GRACE)
            # Where twice as much wants to run as there are cores, a second counts half.
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            left -= (time.monotonic() - began) / max(1.0, load)
        for rank in waiting.values():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)  # it writes its stacks
            with open(self._stacks(rank), encoding="utf-8") as stacks:
                replies[rank] = (f"no answer in time\n{stacks.read()}", None)
        if waiting:
            self._stop()  # the next call starts them anew
        return replies

    def _stacks(self, rank: int) -> str:
        return os.path.join(self._folder.name, f"stacks{rank}")

    def _start(self) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        # Ctrl-C is for the parent, which then ends the others: they inherit that it is blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            open(self._stacks(rank), "w").close()  # to read, however early the process dies
            process = self._context.Process(
                target=_serve, args=(rank, theirs, self._stacks(rank), self._setup), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._layout: Any = None  # their groups are yet to be set up, through a new store

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=1)
            process.kill()
            process.join()


def _serve(rank: int, pipe: Connection, stacks: str, setup: Callable[..., None]) -> None:
    """Answer the calls that come through the pipe, until it closes or the parent ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Its handler is C and answers at once; one in Python would wait for a collective to return.
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"))  # noqa: SIM115
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of a job that this is no part of
        os.environ.pop(variable, None)
    current = ""
    try:
        while True:
            call = pipe.recv_bytes()
            try:
                store, ranks, layout, function, args = pickle.loads(call)
                if current != store:
                    teardown()
                    current = store
                    if rank < ranks:
                        setup(rank, ranks, store, **layout)
                reply = pickle.dumps(("", function(*args) if rank < ranks else None))
            except BaseException as failure:
                brief = traceback.format_exception_only(failure)[0].splitlines()[0]
                reply = pickle.dumps((f"{brief}\n{traceback.format_exc()}", None))
            pipe.send_bytes(reply)
    except (EOFError, OSError):
        os._exit(0)  # the parent closed the pipe; an ordinary exit would wait for gloo's threads


def _end_with_parent() -> None:
    """End this process when its parent ends, even if it is stuck or its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
