# SPDX-License-Identifier: Apache-2.0
"""Whether the tests that the source form adds to megatron-core notice when its code is wrong.

    python tests/mutations.py MEGATRON_LM [--markdown]

copies a Megatron-LM checkout, puts the source form in, runs the tests that it adds on two ranks,
and runs them again for each of a number of mistakes. Every mistake must make a test fail. As a
plugin of pytest, this file lets those tests run on CPU ranks, over gloo, where there is no GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_CORE = "megatron/core"
_EMBEDDING = f"{_CORE}/models/common/embeddings/language_model_embedding.py"
_GPT = f"{_CORE}/models/gpt/gpt_model.py"
_HYBRID = f"{_CORE}/models/hybrid/hybrid_model.py"
_MTP = f"{_CORE}/transformer/multi_token_prediction.py"
_MODULE = f"{_CORE}/models/common/language_module/language_module.py"
_EMBEDDING_TESTS = "tests/unit_tests/models/test_base_embedding.py"
_MTP_TESTS = "tests/unit_tests/transformer/test_multi_token_prediction.py"

_CALL = r"scatter_embeddings\(\s*{}, (\w+), position_ids, [^)]*\)"
_PLAIN = r"{}(input_ids=\1, position_ids=position_ids)"
_NEVER = r"if False and _runs_own_forward(embedding, LanguageModelEmbedding)"

_ADDED_TO_MTP = "test_get_embeddings_scatters_when_embedding_does_not"
_ADDED = f"{_ADDED_TO_MTP} or Padding or Tower"


class Mutation(NamedTuple):
    """A mistake: in a file, what a regular expression matches is replaced."""

    name: str
    path: str
    pattern: str
    replacement: str


MUTATIONS = (
    Mutation("padding: no offset of the rank", _MODULE, r"offset = self\.tp_group.*", "offset = 0"),
    Mutation(
        "GPT does not scatter",
        _GPT,
        _CALL.format(r"self\.embedding"),
        _PLAIN.format("self.embedding"),
    ),
    Mutation(
        "hybrid does not scatter",
        _HYBRID,
        _CALL.format(r"self\.embedding"),
        _PLAIN.format("self.embedding"),
    ),
    Mutation(
        "MTP training does not scatter", _MTP, _CALL.format("embedding"), _PLAIN.format("embedding")
    ),
    Mutation(
        "MTP's speculative step does not scatter",
        _MTP,
        r"scatter_embeddings\(\s*embedding, next_token_ids, position_ids, [^)]*\)",
        "embedding(input_ids=next_token_ids, position_ids=position_ids)",
    ),
    Mutation(
        "MTP's speculative step scatters for all hidden states",
        _MTP,
        r"if hidden_states\.shape\[0\] == next_token_ids\.shape\[1\]:",
        "if False:",
    ),
    Mutation(
        "scattered twice", _EMBEDDING, r"if embeddings\.shape\[0\] \* tp_size == .*", "if False:"
    ),
    Mutation(
        "scattered twice, after the reduce-scatter",
        _EMBEDDING,
        r"return embedding\(\s*(input_ids=.*, scatter_to_sequence_parallel=True)\s*\)",
        r"return tensor_parallel.scatter_to_sequence_parallel_region(embedding(\1))",
    ),
    Mutation("the part is a view", _EMBEDDING, r"embeddings\.clone\(\) if config.*", "embeddings"),
    Mutation(
        "the part is a view, with learned positions",
        _EMBEDDING,
        r"is None or not reduce_scatter\)",
        "is None)",
    ),
    Mutation(
        "always cloned",
        _EMBEDDING,
        r"if config\.clone_scatter_output_in_embedding else embeddings",
        "",
    ),
    Mutation(
        "all-reduce and split", _EMBEDDING, r"if _runs_own_forward\(embedding, Lang\w+\)", _NEVER
    ),
    Mutation(
        "replaced forwards get the argument",
        _EMBEDDING,
        r" and type\(module\)\.forward\.__module__ == cls\.__module__",
        "",
    ),
    Mutation("no check of the length", _EMBEDDING, r"if length % tp_size:", "if False:"),
    Mutation("length checked too late", _EMBEDDING, r"_check_length\(input_ids.*", "pass"),
    Mutation(
        "a function is scattered",
        _EMBEDDING,
        r"'scatter_to_sequence_parallel', True\)",
        "'scatter_to_sequence_parallel', False)",
    ),
)


def pytest_configure() -> None:
    """Let megatron-core's unit tests run on CPUs, if there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    from megatron.core import tensor_parallel
    from megatron.core.transformer import multi_token_prediction, torch_norm

    torch.set_num_threads(1)
    here = torch.device("cpu")
    torch.cuda.current_device = lambda: here
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_: self
    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **more: start("gloo", **more)
    # The only tracker that does not ask a GPU for its state.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    # What is here in place of Transformer Engine refuses sequence parallelism, or is None.
    torch_norm.WrappedTorchNorm.__new__ = lambda cls, config, hidden_size, eps=1e-5, **_: (
        torch.nn.LayerNorm(hidden_size, eps)
    )
    multi_token_prediction.is_inference_column_parallel_linear = lambda _: False


def _failures(tree: Path) -> tuple[int, int, str]:
    """Run the added tests on two ranks.

    Returns:
        tuple[int, int, str]: how many failed on either rank, how many passed on the first, and the
        output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--tee", "3"]
    command += [
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "mutations",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
    ]
    command += ["-o", "addopts=", "-q", "--tb=line", "-k", _ADDED, _EMBEDDING_TESTS]
    command += [_MTP_TESTS] if _ADDED_TO_MTP in (tree / _MTP_TESTS).read_text() else []
    path = os.pathsep.join([str(tree), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    counts = {word: re.findall(rf"(\d+) {word}", done.stdout) for word in ("failed", "passed")}
    failed, passed = (max(map(int, counts[word]), default=0) for word in ("failed", "passed"))
    return failed, passed, done.stdout + done.stderr


def main() -> int:
    """Try the mistakes, print a table, and return 1 if one went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="a Megatron-LM checkout")
    parser.add_argument("--only", metavar="WORD", default="", help="mistakes with this in the name")
    arguments = parser.parse_args()
    from megatron_sp_fix import source  # here, since pytest's processes import this file, too

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        for part in ("megatron", "tests"):
            shutil.copytree(arguments.checkout / part, tree / part)
        patch = source.diff(tree)
        subprocess.run(["git", "apply"], cwd=tree, input=patch, text=True, check=True)
        failed, passed, output = _failures(tree)
        print(f"without a mistake: {failed} failed, {passed} passed")
        if failed or not passed:
            print(output)
            return 1
        print("\n| mistake | tests that fail |\n|---|---|")
        unnoticed = 0
        for mutation in MUTATIONS:
            path = tree / mutation.path
            text = path.read_text()
            wrong, count = re.subn(mutation.pattern, mutation.replacement, text)
            if arguments.only not in mutation.name or not path.exists():
                continue
            if not count:
                print(f"| {mutation.name} | not in this tree |")
                continue
            path.write_text(wrong)
            failed, passed, output = _failures(tree)
            path.write_text(text)
            unnoticed += not failed
            print(f"| {mutation.name} | {failed or 'NONE'} of {failed + passed} |", flush=True)
    return int(bool(unnoticed))


if __name__ == "__main__":
    sys.exit(main())
