# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share: ranks, variants timed in turn, bytes, collectives, the JSON."""

import argparse
import contextlib
import copy
import gc
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
from torch import Tensor

WARM_UP = 3
# Before each timed run the device idles this many cycles (about 5 ms), so that the host is ahead of
# it: else short runs would time Python. What the host needs is in `host_ms`.
SLEEP = 10_000_000


class Variant(NamedTuple):
    """One way to run what is measured; ``backward`` is given what ``forward`` returned."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]
    model: Optional[torch.nn.Module] = None


@contextlib.contextmanager
def fixed(tower: Any) -> Iterator[Any]:
    """Apply the fix, once: patching between runs would leave Python's caches cold for the next.

    Yields:
        The tower once more, with the same parameters, running the release's own method; None where
        that does not mend a standalone forward.
    """
    import megatron_sp_fix

    native = None
    for site in megatron_sp_fix.status().sites:
        if site.name == "GPTModel._preprocess" and site.native == "own scatter":
            native = copy.copy(tower)
            own = {"_preprocess": type(tower).__dict__["_preprocess"]}
            native.__class__ = type("Native", (type(tower),), own)
    with megatron_sp_fix.applied():
        yield native


def parse(description: str, **defaults: Any) -> argparse.Namespace:
    """Parse the options; ``defaults`` become options of these names: integers, or one of a list."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in defaults.items():
        if isinstance(value, tuple):  # the first is the default
            parser.add_argument(f"--{name}", choices=value, default=value[0])
            continue
        several = isinstance(value, list)
        parser.add_argument(
            f"--{name}", type=int, nargs="+" if several else None, default=value, metavar="N"
        )
    parser.add_argument("--rounds", type=int, default=40, help="timed runs of each variant")
    parser.add_argument("--ranks", type=int, default=2, help="the TP size")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for all of it")
    parser.add_argument("--cpu", action="store_true", help="to try it out, over gloo")
    parser.add_argument("--out", type=Path, help="JSON; by default results/NAME-MODE.json")
    options = parser.parse_args()
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    # The order of kernels that overlap communication relies on it; set before CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return options


def run(name: str, measure: Callable[..., list[tuple]], options: argparse.Namespace) -> None:
    """Measure on every rank; write the figures of all ranks as JSON, and print them.

    Args:
        name: of the benchmark.
        measure: importable by name; called with the options, returns (length, variant, figures).
        options: as :func:`parse` returns.
    """
    if "RANK" in os.environ:  # torchrun
        from megatron_sp_fix.demo.ranks import setup

        setup(int(os.environ["RANK"]), options.ranks, "env://", tp=options.ranks)
        results = [None] * options.ranks
        torch.distributed.all_gather_object(results, _on_rank(measure, options))
        torch.distributed.destroy_process_group()
        if int(os.environ["RANK"]):
            return
    else:
        from megatron_sp_fix.demo.ranks import Ranks

        with Ranks(options.ranks, tp=options.ranks) as ranks:
            results = ranks.run(_on_rank, measure, options, timeout=options.timeout)
    facts, figures = zip(*results)
    mode = "cpu" if options.cpu else "gpus"
    machine = facts[0] | {"ranks": options.ranks}
    unsaid = ("out", "timeout", "cpu", "ranks")
    setting = {key: value for key, value in vars(options).items() if key not in unsaid}
    setting |= {"batch": 1, "dtype": "bfloat16"}
    head = {"benchmark": name, "mode": mode, "machine": machine, "setting": setting}
    rows = [
        {"length": of[0][0], "variant": of[0][1], "ranks": [mine for *_, mine in of]}
        for of in zip(*figures)
    ]
    out = options.out or Path(__file__).parent / "results" / f"{name}-{mode}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)  # one line each, for short diffs
    out.write_text(f'{json.dumps(head)[:-1]}, "results": [\n{lines}\n]}}\n')
    print(json.dumps(head))
    for row in rows:
        for rank, mine in enumerate(row["ranks"]):
            print(f"{row['length']:>7} {row['variant']:20} rank {rank}: {_brief(mine)}")
    print(out)


def _brief(figures: dict[str, Any]) -> str:
    shown = []
    for key, value in figures.items():
        if isinstance(value, dict) and "median" in value:
            shown.append(f"{key} {value['median']:.3f} [{value['q1']:.3f}, {value['q3']:.3f}]")
        elif key.endswith("bytes") and value is not None:
            shown.append(f"{key} {value / 2**20:.1f} MiB")
        elif key in ("loss", "loss_is_plain"):
            shown.append(f"{key} {value}")
    return ", ".join(shown)


def _on_rank(measure: Callable[..., list[tuple]], options: argparse.Namespace) -> tuple:
    """This rank's facts and figures."""
    import megatron_sp_fix

    facts = {
        "torch": torch.__version__,
        "megatron-core": megatron_sp_fix.status().version,
        "backend": torch.distributed.get_backend(),
    }
    if not options.cpu:
        gpus = torch.cuda.device_count()
        if gpus < options.ranks:
            raise RuntimeError(f"{gpus} GPUs for {options.ranks} ranks: see --ranks and --cpu")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            facts["driver"] = subprocess.check_output(query, text=True).split()[0]
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "nccl_settings": {
                name: value
                for name, value in os.environ.items()
                if name.startswith("NCCL_") and name not in ("NCCL_VERSION", "NCCL_DEBUG")
            },
        }
    torch.manual_seed(1)  # weights made on a CPU are cut from the same ones on every rank
    return facts, measure(options)


def config(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` for a model in bf16."""
    return {
        "hidden_size": options.hidden,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "use_cpu_initialization": options.cpu,
        **more,
    }


def tokens(length: int, vocabulary: int) -> dict[str, Tensor]:
    """One sequence of ids from all of the vocabulary, on every rank the same: no mask."""
    ids = torch.randint(vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.to(torch.cuda.current_device())
    positions = torch.arange(length, device=ids.device)[None]
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "position_ids": positions,
        "attention_mask": None,
        "labels": ids[:, 1:].contiguous(),
    }


def compare(variants: dict[str, Variant], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Account for each variant once, then time all of them in turn, round after round."""
    figures = {name: account(variant, not options.cpu) for name, variant in variants.items()}
    order = list(variants)
    runs: dict[str, list[tuple]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle  # the same order on every rank
    for _ in range(WARM_UP + options.rounds):
        shuffle(order)  # so that nobody always follows the same one
        for name in order:
            runs[name].append(_once(variants[name], not options.cpu))
    for name, times in runs.items():
        for key, values in zip(("host_ms", "forward_ms", "step_ms"), zip(*times[WARM_UP:])):
            q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
            figures[name][key] = {
                part: round(value, 4)  # to 100 ns
                for part, value in (("q1", q1), ("median", median), ("q3", q3))
            }
    return figures


def _once(variant: Variant, cuda: bool) -> tuple[float, float, float]:
    """Milliseconds: of the host in the forward, of the forward, of forward and backward."""

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    tick = torch.ones(1, device=torch.cuda.current_device())
    _drop_gradients(variant)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP)
    torch.distributed.all_reduce(tick)  # the ranks start together
    start, host_start = now(), time.perf_counter()
    output = variant.forward()
    host, middle = time.perf_counter() - host_start, now()
    variant.backward(output)
    end = now()
    if not cuda:
        return host * 1e3, (middle - start) * 1e3, (end - start) * 1e3
    torch.cuda.synchronize()
    return host * 1e3, start.elapsed_time(middle), start.elapsed_time(end)


def _drop_gradients(variant: Variant) -> None:
    if variant.model is not None:
        variant.model.zero_grad(set_to_none=True)


def account(variant: Variant, cuda: bool) -> dict[str, Any]:
    """Bytes and collectives of one untimed run.

    Returns:
        dict: ``kept_bytes`` from the forward to the backward, the output's own included; on CPUs
        those of storages that autograd saved or the output lies in, parameters aside.
        ``forward_peak_bytes`` and ``peak_bytes`` (of both passes, with gradients): above what was
        there before; None on CPUs. ``buffer_bytes``: what megatron-core allocates once and reuses
        in its gathers; in none of the others. All are None without a model. ``collectives``: names,
        and bytes of the full-length tensor, in order. ``loss``: the output, if it is a scalar.
    """
    from megatron.core.parallel_state import get_global_memory_buffer

    buffer = get_global_memory_buffer().buffer
    buffer.clear()
    variant.backward(variant.forward())  # fills the buffer, and caches of positions
    _drop_gradients(variant)
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    sent: dict[str, list] = {"forward": [], "backward": []}
    kept = peak = both = None
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.nullcontext() if cuda else hooks, _noted(sent["forward"]):
        output = variant.forward()
    if cuda:
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        peak = torch.cuda.max_memory_allocated() - before
    else:
        save(output)
        for parameter in variant.model.parameters() if variant.model else ():
            saved.pop(parameter.untyped_storage().data_ptr(), None)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    with _noted(sent["backward"]):
        variant.backward(output)
    if cuda:
        torch.cuda.synchronize()
        both = torch.cuda.max_memory_allocated() - before
    figures = {
        "kept_bytes": kept,
        "forward_peak_bytes": peak,
        "peak_bytes": both,
        "buffer_bytes": sum(tensor.nbytes for tensor in buffer.values()),
    }
    if variant.model is None:
        figures = dict.fromkeys(figures)
    loss = {"loss": output.item()} if output.dim() == 0 else {}
    return {**figures, **loss, "collectives": sent}


@contextlib.contextmanager
def _noted(calls: list[tuple[str, int]]) -> Iterator[None]:
    """Note every collective, wherever megatron-core keeps its function."""
    from megatron.core.tensor_parallel import layers, mappings

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            full = max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            calls.append((function.__name__, full))
            return function(*args, **kwargs)

        return call

    places = [(torch.distributed, "all_reduce")]
    for name, alias in (
        ("all_gather_into_tensor", "dist_all_gather_func"),
        ("reduce_scatter_tensor", "dist_reduce_scatter_func"),
    ):
        places += [(torch.distributed, name), (mappings, alias), (layers, alias)]
    with contextlib.ExitStack() as stack:
        for place, name in places:
            stack.enter_context(mock.patch.object(place, name, noting(getattr(place, name))))
        yield
