# SPDX-License-Identifier: Apache-2.0
"""Somebody's job: trains a language tower alone under SP. It knows nothing of the fix.

Called with the way in which it is to get its two ranks; prints one line a rank that got through.
"""

import multiprocessing
import os
import sys
import tempfile


def train(rank, store):
    import torch

    from megatron_sp_fix.demo import models, ranks

    ranks.setup(rank, 2, store, tp=2)
    try:
        tower = models.build("mtp", False)  # which every release of megatron-core leaves broken
    except TypeError:  # main's MTP needs Transformer Engine
        tower = models.build("gpt", False)
    data = models.batch(16)
    loss = models.forward(tower, data)
    mask = torch.ones(2, 16)
    (loss * mask).sum().backward()
    # Straight to the pipe: lines of two ranks must not mix.
    line = f"rank {rank}: loss of {loss.shape[1]} tokens\n"
    os.write(1, line.encode())
    torch.distributed.destroy_process_group()
    return line


def by_processes(method, store):
    if method == "fork":
        from megatron.core.models.gpt import GPTModel  # noqa: F401
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=train, args=(rank, store)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(process.exitcode for process in processes)


def by_ray(store):
    os.environ["RAY_raylet_start_wait_time_s"] = "300"  # noqa: SIM112 - by this very name
    import ray

    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")

    @ray.remote(num_cpus=1)
    class Worker:
        def __init__(self, rank):
            self.rank = rank

        def train(self, store):
            return train(self.rank, store)

    workers = [Worker.remote(rank) for rank in (0, 1)]
    # Ray may end before it has brought what the workers wrote.
    print(*ray.get([worker.train.remote(store) for worker in workers]))
    ray.shutdown()


if __name__ == "__main__":
    way = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        if way == "torchrun":
            train(int(os.environ["RANK"]), "env://")
        elif way == "mpirun":
            train(int(os.environ["OMPI_COMM_WORLD_RANK"]), f"file://{sys.argv[2]}")
        elif way == "ray":
            by_ray(store)
        else:
            sys.exit(by_processes(way, store))
