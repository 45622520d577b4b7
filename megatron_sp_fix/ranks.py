# SPDX-License-Identifier: Apache-2.0
"""Ranks of real processes: a pool that lives for a session, over gloo on CPUs or NCCL on GPUs."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Optional

__all__ = ["Ranks", "RankError", "setup", "teardown"]


class RankError(RuntimeError):
    """A function failed on one of the ranks; the message holds every rank's traceback."""


class Ranks:
    """Processes that run functions as the ranks of a process group.

    Args:
        size: how many processes.

    Example:
        >>> with Ranks(2) as ranks:
        ...     ranks.run(function, 16, tp=2)  # calls function(16) on both; returns both results
    """

    def __init__(self, size: int) -> None:
        cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not os.path.exists("/dev/nvidia0")
        # One import of torch and megatron-core, then a fork a rank; CUDA does not survive a fork.
        context: Any = multiprocessing.get_context("forkserver" if cpu else "spawn")
        if cpu:
            context.set_forkserver_preload([f"{__package__}.models"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-sp-fix-")
        self._setups = 0
        self._context = context
        self._start()

    def _start(self) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            open(self._stack(rank), "w").close()  # to read, however soon the process dies
            process = self._context.Process(
                target=_serve, args=(rank, theirs, self._stack(rank)), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._layout: Any = None  # their groups are yet to be set up, through a new store

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
            timeout: seconds that the slowest rank may take; then all are ended and started anew.
            layout: keywords of :func:`setup`: ``tp``, ``pp`` and so on.

        Returns:
            list: the results, by rank.

        Raises:
            RankError: the function raised on some rank, or took too long, or a process that takes
                no part did not leave its groups; the message says where.
        """
        if not all(process.is_alive() for process in self._processes):
            self._restart()  # one died since its last answer
        ranks = ranks or self.size
        if self._layout != (ranks, layout):
            self._layout = (ranks, layout)
            self._setups += 1
        store = os.path.join(self._folder.name, f"store{self._setups}")
        call = pickle.dumps((ranks, store, layout, function, args))
        # The others leave the groups they are in: NCCL ends one only when all of its ranks leave.
        leave = pickle.dumps((0, store, {}, None, ()))
        for rank, pipe in enumerate(self._pipes):
            pipe.send_bytes(call if rank < ranks else leave)
        results, errors, lost = [], [], False
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self._pipes):
            error, result = None, None
            try:
                if pipe.poll(max(0, deadline - time.monotonic())):
                    error, result = pickle.loads(pipe.recv_bytes())
                else:
                    lost = True
                    os.kill(self._processes[rank].pid, signal.SIGUSR1)
                    time.sleep(0.5)  # it writes its stacks
                    with open(self._stack(rank), encoding="utf-8") as stacks:
                        error = f"no answer after {timeout} s\n{stacks.read()}"
            except EOFError:
                error, lost = "the process died", True
            results.append(result)
            if error:
                who = f"rank {rank} of {ranks}" if rank < ranks else f"process {rank}, leaving"
                errors.append(f"{who}: {error}")
        if lost:
            self._restart()
        if errors:
            self._layout = None  # a collective may have been left half done
            raise RankError("\n".join(errors))
        return results[:ranks]

    def _restart(self) -> None:
        self._stop()
        self._start()

    def _stack(self, rank: int) -> str:
        return os.path.join(self._folder.name, f"stack{rank}")

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self._folder.cleanup()

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()


def _serve(rank: int, pipe: Connection, stack: str) -> None:
    # Python's own handler would wait for the collective to return.
    stacks = open(stack, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    faulthandler.register(signal.SIGUSR1, file=stacks)
    current: Any = None
    while True:
        try:
            ranks, store, layout, function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # gloo's threads would keep an ordinary exit waiting
        error, result = None, None
        try:
            if current != store:
                teardown()
                current = store
                if rank < ranks:
                    setup(rank, ranks, f"file://{store}", **layout)
            if rank < ranks:
                result = function(*args)
        except BaseException:
            error = traceback.format_exc()
        try:
            reply = pickle.dumps((error, result))
        except Exception:
            reply = pickle.dumps((traceback.format_exc(), None))
        pipe.send_bytes(reply)


def setup(
    rank: int,
    ranks: int,
    store: str,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    vpp: Optional[int] = None,
) -> None:
    """Make this process a rank: process groups, device and random state.

    Over NCCL where there is a GPU for each rank, else over gloo on CPUs. With ``SHARE_GPU=1`` in
    the environment ranks share what GPUs there are, at the speed of sockets.

    Args:
        rank: this process's rank.
        ranks: the number of ranks.
        store: ``init_method`` of ``torch.distributed.init_process_group``.
        tp: tensor parallel size.
        pp: pipeline parallel size.
        cp: context parallel size.
        ep: expert parallel size.
        vpp: virtual pipeline stages a rank.
    """
    import torch

    from megatron.core import parallel_state, tensor_parallel

    gpus = torch.cuda.device_count()
    gpu = gpus >= ranks
    if 0 < gpus < ranks and os.environ.get("SHARE_GPU") == "1":
        # NCCL wants a GPU for each rank of a host: let each rank call itself a host.
        os.environ["NCCL_HOSTID"] = f"rank {rank}"
        gpu = True
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % gpus)
    else:
        torch.set_num_threads(1)
        # megatron-core allocates what a collective fills on "the current CUDA device".
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", init_method=store, rank=rank, world_size=ranks
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
    )
    if gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
    else:
        # The only tracker that does not ask a GPU for its state; its fork() leaves the CPU's alone.
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def teardown() -> None:
    """Undo :func:`setup`'s process groups, if there are any."""
    import torch

    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
