# SPDX-License-Identifier: Apache-2.0
"""Ranks of real processes: a pool that lives for a session, over gloo on CPUs or NCCL on GPUs."""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Optional

__all__ = ["Ranks", "RankError", "setup", "teardown"]

_TIMEOUT = datetime.timedelta(seconds=120)


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
        context = multiprocessing.get_context("forkserver" if cpu else "spawn")
        if cpu:
            context.set_forkserver_preload([f"{__package__}.models"])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-sp-fix-")
        self._runs = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = 0, **layout: Any) -> list[Any]:
        """Call a function on every rank at once.

        Args:
            function: importable by name in another process.
            args: its arguments, picklable.
            ranks: how many ranks take part; all by default.
            layout: keywords of :func:`setup`: ``tp``, ``pp``, ``cp``, ``ep``, ``vpp``.

        Returns:
            list: the results, by rank.

        Raises:
            RankError: the function raised on some rank.
        """
        ranks = ranks or self.size
        self._runs += 1
        store = os.path.join(self._folder.name, f"store{self._runs}")
        call = pickle.dumps((ranks, store, layout, function, args))
        for pipe in self._pipes[:ranks]:
            pipe.send_bytes(call)
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes[:ranks]):
            try:
                error, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                error, result = f"the process of rank {rank} died", None
            results.append(result)
            if error:
                errors.append(f"rank {rank} of {ranks}:\n{error}")
        if errors:
            raise RankError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()


def _serve(rank: int, pipe: Connection) -> None:
    current: Any = None
    while True:
        try:
            ranks, store, layout, function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # gloo's threads would keep an ordinary exit waiting
        error, result = None, None
        try:
            if current != (ranks, layout):
                current = None
                teardown()
                setup(rank, ranks, f"file://{store}", **layout)
                current = (ranks, layout)
            result = function(*args)
        except BaseException:
            error = traceback.format_exc()
            current = None  # a collective may have been left half done
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

    gpu = torch.cuda.device_count() >= ranks
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    else:
        torch.set_num_threads(1)
        # megatron-core allocates what a collective fills on "the current CUDA device".
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", init_method=store, rank=rank, world_size=ranks, timeout=_TIMEOUT
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
