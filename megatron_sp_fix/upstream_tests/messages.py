# SPDX-License-Identifier: Apache-2.0
"""What the mails of the source form say. They are the texts of the pull requests, too.

A sentence stands in a mail only if it is true of the tree at hand.
"""

from . import core

_SUBJECTS = {
    "padding": "Zero the padding rows of a quantized batch on every rank",
    "scatter": "Scatter the embeddings of a standalone language model in one place",
    "reduce_scatter": "Reduce-scatter the embeddings of a standalone language model",
}

_PADDING = """\
With quantization scales, {models} zero the embeddings of a dynamic
batch's padding tokens, so that these do not count in amax. padding_slice counts
from the start of the batch. Under sequence parallelism a rank has s / tp rows
of it, so every rank but the first keeps padding rows that are not zero.

LanguageModule gets a method that takes the rank's offset into account, and both
models call it. Where a rank has all rows, nothing changes.

The new test fails on the second rank without the change.
"""

_SCATTER = """\
An embedding built with scatter_embedding_sequence_parallel=False returns all
rows, [s, b, h], because the multimodal model around the language model inserts
other embeddings before it scatters. When the language model embeds its own
tokens (distillation, quantization, text-only training), its decoder must get
[s / tp, b, h].

{today}

scatter_embeddings, beside LanguageModelEmbedding, embeds for a decoder and
scatters where the embedding does not. {callers} call it.
- The scattered part is cloned as clone_scatter_output_in_embedding says. A view
  keeps all rows until backward.
- Rows that are s / tp already, from a wrapper that scatters, are left as they
  are.
- An embedding without the attribute scatter_to_sequence_parallel (a function)
  is left alone{flagless}.
- A length that the tensor parallel size does not divide raises a ValueError
  that says so.{full_step}

A multimodal model sees no change: its own calls of the embedding return all
rows. Padding masks are not touched.

The new tests run on two ranks and compare loss, gradients and the decoder's
input, bitwise, with those of a model that scatters. They fail if any of the
call sites does not scatter, if the part is a view, or if it is scattered
twice.{mocked}
"""

_REDUCE_SCATTER = """\
For the decoder of a model built with scatter_embedding_sequence_parallel=False,
the word embeddings are all-reduced and then split. A model whose embedding
scatters pays one reduce-scatter, which sends half as much, and never holds the
sum of all rows.

LanguageModelEmbedding.forward and VocabParallelEmbedding.forward take an
optional argument that overrides, for one call, what they were built with.
scatter_embeddings uses it where both modules run the forward of their own
class. A subclass's forward, or one that replaces the class's, does not get the
argument, and its output is scattered as before. Classes decide this, since the
collectives of all ranks must match. An instance's own forward gets the
argument, and has to take it.

With the argument, the embedding does what it does in a model that scatters:
dropout acts on this rank's rows, learned positions are added before a scatter
that is cloned, and hooks on either module see this rank's rows. The output of a
reduce-scatter is not a view, and is not cloned. A length that the tensor
parallel size does not divide is refused before any collective. Without the
argument nothing changes.

The new tests count the collectives of the tensor parallel group, and fail if
the embeddings are all-reduced.
"""


def message(name: str, files: dict[str, str]) -> tuple[str, str]:
    """Write the subject and the text of a patch.

    Args:
        name: ``padding``, ``scatter`` or ``reduce_scatter``.
        files: the files of the tree before the patch, by their paths.

    Returns:
        tuple[str, str]: the subject; the text, which ends with a newline.
    """
    hybrid = "HybridModel" if core.HYBRID in files else "MambaModel"
    models = f"GPTModel and {hybrid}"
    decoder = "not self.embedding.scatter_to_sequence_parallel" in files[core.GPT]
    training = 'embedding, "scatter_to_sequence_parallel", True' in files[core.MTP]
    step = "def forward_single_position" in files[core.MTP]
    today = [
        f"{models} do this themselves, each in its forward."
        if decoder
        else f"{models} do not scatter: their decoder runs on all rows on every rank.",
        "Multi-token prediction does it in training"
        if training
        else "Multi-token prediction does not scatter in training",
    ]
    if step:
        today[1] += ", but not in the speculative step" if training else " or speculative decoding"
    callers = [models, "multi-token prediction"]
    texts = {
        "padding": _PADDING.format(models=models),
        "scatter": _SCATTER.format(
            today="\n".join(f"- {line.rstrip('.')}." for line in today),
            callers=" and ".join(callers),
            flagless=f", as multi-token prediction\n  does today; {models} raise an AttributeError"
            if decoder
            else "",
            full_step="\n- In the speculative step, hidden states of all rows go with embeddings of all rows."
            if step
            else "",
            mocked="\n\nThe test of the scatter in _get_embeddings keeps its cases. It mocks the scatter\n"
            "where it is now, with a group of two, and gains the speculative step."
            if training
            else "",
        ),
        "reduce_scatter": _REDUCE_SCATTER,
    }
    return _SUBJECTS[name], texts[name]
