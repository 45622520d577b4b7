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

_SCATTERS = r"scatter_embeddings\(\s*([\w.]+), (input_ids|next_token_ids), position_ids, [^)]*\)"
_EMBEDS = r"\1(input_ids=\2, position_ids=position_ids)"

_ADDED_TO_MTP = "test_get_embeddings_scatters_when_embedding_does_not"
_ADDED = f"{_ADDED_TO_MTP} or PaddingRows or Tower"


class Mutation(NamedTuple):
    """A mistake: in a file, what a regular expression matches is replaced."""

    name: str
    path: str
    pattern: str
    replacement: str


MUTATIONS = (
    Mutation("padding: without the rank's offset", _MODULE, r"offset = self\.tp_.*", "offset = 0"),
    Mutation("GPT does not scatter", _GPT, _SCATTERS, _EMBEDS),
    Mutation("hybrid does not scatter", _HYBRID, _SCATTERS, _EMBEDS),
    Mutation(
        "MTP does not scatter in training", _MTP, _SCATTERS.replace("|next_token_ids", ""), _EMBEDS
    ),
    Mutation(
        "MTP does not scatter in its step", _MTP, _SCATTERS.replace("input_ids|", ""), _EMBEDS
    ),
    Mutation(
        "MTP's step always scatters",
        _MTP,
        r"if self.* hidden_states\.shape\[0\] == .*:",
        "if False:",
    ),
    Mutation("scatters twice", _EMBEDDING, r"if input_ids is not None and .*", "if False:"),
    Mutation("needs token ids", _EMBEDDING, "if input_ids is not None and", "if"),
    Mutation("needs [b, s]", _EMBEDDING, r"(\* tp_size == input_ids\.shape)\[-1\]", r"\1[1]"),
    Mutation(
        "scatters twice, after a reduce-scatter",
        _EMBEDDING,
        r"embeddings = (embedding\(\s*input_ids=.*, scatter_to_sequence_parallel=True\s*\))$",
        r"return tensor_parallel.scatter_to_sequence_parallel_region(\1)",
    ),
    Mutation("a view", _EMBEDDING, r"embeddings\.clone\(\) if config.*", "embeddings"),
    Mutation("always clones", _EMBEDDING, r" if config\.clone_.* else embeddings", ""),
    Mutation("always clones a stock embedding's", _EMBEDDING, r"self\.config\.clone_\w+", "True"),
    Mutation(
        "all-reduce and split", _EMBEDDING, r"(\(type\(embedding\), .* is) _EMB.*", r"\1 False"
    ),
    Mutation(
        "replaced embeddings get the argument",
        _EMBEDDING,
        r"getattr\(type\(embedding\), 'forward', None\) is _EMBEDDING_FORWARD",
        "getattr(type(embedding).forward, '__module__', '') == LanguageModelEmbedding.__module__",
    ),
    Mutation(
        "replaced word embeddings get the argument",
        _EMBEDDING,
        r"(type\(embedding\.word_embeddings\)\.forward) is _WORD_EMBEDDING_FORWARD",
        r"\1.__module__ == tensor_parallel.VocabParallelEmbedding.__module__",
    ),
    Mutation(
        "no check of the rows", _EMBEDDING, r"if embeddings\.shape\[0\] not in .*", "if False:"
    ),
    Mutation("no check of the length", _EMBEDDING, r"if length % tp_size:", "if False:"),
    Mutation("checks the length too late", _EMBEDDING, r" _check_length\(length, .*", " pass"),
    Mutation("scatters for functions", _EMBEDDING, r"_parallel', True\)", "_parallel', False)"),
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
        failed, total, output = _failures(tree)
        print(f"without a mistake: {failed} failed, {total} passed")
        if failed or not total:
            print(output)
            return 1
        print("\n| mistake | tests that fail |\n|---|---|")
        unnoticed = 0
        for mutation in MUTATIONS:
            path = tree / mutation.path
            text = path.read_text() if path.exists() else ""
            wrong, count = re.subn(mutation.pattern, mutation.replacement, text, flags=re.M)
            if arguments.only not in mutation.name:
                continue
            if not count:
                print(f"| {mutation.name} | not in this tree |")
                continue
            path.write_text(wrong)
            failed, _, _ = _failures(tree)
            path.write_text(text)
            unnoticed += not failed
            print(f"| {mutation.name} | {failed or 'NONE'} of {total} |", flush=True)
    return int(bool(unnoticed))


if __name__ == "__main__":
    sys.exit(main())
