# SPDX-License-Identifier: Apache-2.0
"""Distil the language tower of a multimodal model with ModelOpt, under sequence parallelism.

Student and teacher are megatron-core ``GPTModel`` towers: built, as a multimodal model builds its
language part, with ``scatter_embedding_sequence_parallel=False``. Distilled alone, they embed their
own tokens, and up to megatron-core 0.18 nobody shards these: at tensor parallel (TP) size 2 the
logits, and so ModelOpt's loss of each token, are twice as long as the loss mask. One line puts that
right, before or after the models are built::

    megatron_sp_fix.apply()

The example distils a plain LM with the same weights for reference, then the tower, and compares.

    pip install ".[distill]"                                             # in a clone
    python examples/distill_language_tower.py                            # two ranks, GPUs or CPUs
    python examples/distill_language_tower.py --no-fix                   # how it fails
    torchrun --nproc-per-node 2 examples/distill_language_tower.py       # as ranks of a job
"""

import argparse
import logging
import os
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import megatron_sp_fix
from megatron_sp_fix.demo.ranks import RankError, Ranks, setup

TP, LENGTH, PROMPT, STEPS = 2, 16, 4, 10


def convert(student: Any, teacher: Any) -> Any:
    """Join a student and a teacher into one ModelOpt model that trains the student.

    Args:
        student: a ``GPTModel``; changed in place.
        teacher: a ``GPTModel`` with the same vocabulary; frozen.

    Returns:
        The student as a ``modelopt.torch.distill.DistillationModel``.
    """
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins import megatron as mtd_megatron

    # The logits' KL divergence alone, without the LM loss. Kept, the LM loss would meet the tower's
    # doubled logits first, in the cross entropy.
    config = mtd_megatron.setup_distillation_config(
        mtd_megatron.DistillationConfig(skip_lm_loss=True), student.config, teacher.config
    )
    mode = {
        "teacher_model": teacher,
        "criterion": config.criterion,
        "loss_balancer": config.loss_balancer,
    }
    model = mtd.convert(student, mode=[("kd_loss", mode)])
    mtd_megatron.adjust_distillation_model_for_mcore(model, config)
    return model


def masked_mean(loss: Tensor, mask: Tensor, group: Any = None) -> Tensor:
    """Average a loss over the tokens that the mask keeps.

    ModelOpt leaves the mask to the trainer, which passes such a function as ``loss_reduction_fn``.
    This is where an unsharded tower fails.

    Args:
        loss: ``[b, s]``.
        mask: ``[b, s]``, 1 for a token that counts, else 0.
        group: the TP group, if the loss covers only this rank's part of the vocabulary.

    Returns:
        Tensor: a scalar, the same on every rank.
    """
    mean = (loss.flatten() * mask.flatten()).sum() / mask.sum()
    if group is not None:
        # The value alone: each rank's backward starts from its own part, and ModelOpt's loss
        # carries gradients across ranks by itself.
        torch.distributed.all_reduce(mean.detach(), group=group)
    return mean


def distil(scatter: bool, fix: bool) -> list[float]:
    """Distil a model on this rank, as every rank of the TP group does at once.

    Args:
        scatter: True for a plain LM, False for a tower; the weights and the data are the same.
        fix: whether to apply the fix first.

    Returns:
        list[float]: the KD loss before each optimizer step.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron.core import parallel_state
    from megatron_sp_fix.demo import models

    if fix:
        megatron_sp_fix.apply()

    models.seeded(1)
    # Wider than Megatron's 0.02, which at this size would leave the teacher almost no preferences.
    teacher = models.build("gpt", scatter, layers=2, config={"init_method_std": 0.2})
    models.seeded(2)
    student = models.build("gpt", scatter, layers=1)
    model = convert(student, teacher)
    model.train()  # in place: ModelOpt's returns None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)

    data = models.batch(LENGTH, size=1)
    mask = torch.ones_like(data["labels"], dtype=torch.float32)
    mask[:, :PROMPT] = 0  # the student learns the answer, not the prompt

    group, losses = parallel_state.get_tensor_model_parallel_group(), []
    for _ in range(STEPS):
        # The teacher runs within; what returns is the student's LM loss, skipped and so all zeros.
        lm_loss = models.forward(model, data)
        kd_loss = model.compute_kd_loss(
            student_loss=masked_mean(lm_loss, mask),
            # ModelOpt gives the loss [b, s], whether to reduce it over the TP group, and whether
            # it is sharded along the sequence: not so for logits, only for hidden states.
            loss_reduction_fn=lambda out: masked_mean(out[0], mask, group if out[1] else None),
        )["kd_loss"]
        losses.append(kd_loss.item())  # exact: a float32 fits a Python float
        optimizer.zero_grad()
        kd_loss.backward()
        for parameter in trained:
            # Weights that every rank holds whole, but that saw only this rank's tokens.
            # Megatron's own training loop does the same in `finalize_model_grads`.
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.grad, group=group)
        optimizer.step()
    return losses


def report(plain: list[float], tower: list[float], fix: bool) -> bool:
    """Print the losses of both; return whether the tower's fell and equals the plain LM's."""
    print("step  plain LM      tower         equal")
    for step, (expected, actual) in enumerate(zip(plain, tower)):
        equal = "yes" if expected == actual else "NO"
        print(f"{step:4}  {expected:<12.9f}  {actual:<12.9f}  {equal}")
    fell, same = tower[-1] < tower[0], tower == plain
    print(
        f"\nKD loss of the tower, {'with' if fix else 'without'} the fix: "
        f"{'fell' if fell else 'DID NOT FALL'}, "
        f"{'is' if same else 'IS NOT'} bitwise the plain LM's at every step"
    )
    return fell and same


def introduce(fix: bool) -> None:
    """Print what is about to run, and whether megatron-core needs the fix for it."""
    found = megatron_sp_fix.status()
    form = next(site.native for site in found.sites if site.name.startswith("GPTModel."))
    words = {
        "no shard": "does not shard a tower's tokens",
        "own scatter": "shards a tower's tokens by itself",
        "this fix": "carries the fix in its source",
    }
    print(
        f"megatron-core {found.version} {words[form]}; nvidia-modelopt {version('nvidia-modelopt')}"
        f"\nTP {TP}, sequence parallelism on, {LENGTH} tokens, {PROMPT} of them masked; "
        f"{'with' if fix else 'without'} megatron_sp_fix.apply()\n",
        flush=True,
    )


def in_job(fix: bool) -> int:
    """Run as the rank that this process is in a ``torchrun`` job; rank 0 prints."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != TP:
        sys.exit(f"this example takes {TP} ranks; the job has {world}")
    setup(rank, world, "env://", tp=TP)
    try:
        if rank == 0:
            introduce(fix)
        plain, tower = distil(True, False), distil(False, fix)
        good = report(plain, tower, fix) if rank == 0 else plain == tower
    finally:
        torch.distributed.destroy_process_group()
    return 0 if good else 1


def main() -> int:
    """Run the example; return 0 if the loss fell and equals the plain LM's on every rank."""
    parser = argparse.ArgumentParser(
        description="Distil a language tower with ModelOpt on two ranks under sequence parallelism "
        "and compare its KD loss, step by step, with that of a plain LM with the same weights.",
        epilog="Uses two GPUs over NCCL where there are two, else CPU processes over gloo. Under "
        "torchrun it takes part in the job.",
    )
    parser.add_argument(
        "--no-fix",
        action="store_true",
        help="leave megatron-core as it is: up to 0.18 the loss does not fit its mask and the run "
        "fails; from 0.19 on megatron-core shards the tokens itself and it succeeds",
    )
    fix = not parser.parse_args().no_fix
    if find_spec("modelopt") is None:
        sys.exit("needs ModelOpt: pip install '.[distill]' in a clone of megatron-sp-fix")
    if "RANK" in os.environ:
        return in_job(fix)
    # Each rank imports megatron-core, which warns of every optional package that is not there.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    introduce(fix)
    with Ranks(TP, tp=TP) as ranks:
        try:
            # The plain LM first: at that point no process has applied anything.
            plains = ranks.run(distil, True, False)
            towers = ranks.run(distil, False, fix)
        except RankError as error:
            sys.exit(str(error).rstrip())  # every rank's traceback, on standard error
    good = report(plains[0], towers[0], fix)
    return 0 if good and plains == towers else 1


if __name__ == "__main__":
    sys.exit(main())
