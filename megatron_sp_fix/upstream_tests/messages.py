# SPDX-License-Identifier: Apache-2.0
"""What the mails of the source form say. They are the texts of the pull requests, too.

A sentence stands in a mail only if it is true of the tree at hand.
"""

from . import core

_SUBJECTS = {
    "padding": "Zero the padding rows of a quantized batch on every rank",
    "scatter": "Scatter the embeddings of a standalone language model in one place",
    "step": "Scatter embeddings in one place, and in MTP's speculative step",
    "reduce_scatter": "Reduce-scatter the embeddings of a standalone language model",
}

_PADDING = """\
With quantization scales, {models} zero the embeddings of
a dynamic batch's padding tokens, so that these do not count in amax.
padding_slice counts from the start of the batch. Under sequence parallelism a
rank has s / tp rows of it, so every rank but the first may keep padding rows
that are not zero.

LanguageModule gets a method that takes the rank's offset into account, and both
models call it. Where a rank has all rows, nothing changes.
{tests}"""

_SCATTER = """\
An embedding built with scatter_to_sequence_parallel=False returns all rows,
[s, b, h], for a multimodal model to insert other embeddings. When the language
model embeds its own tokens (distillation, quantization, text-only training),
its decoder must get [s / tp, b, h].
{today}
scatter_embeddings, beside LanguageModelEmbedding, scatters where the embedding
does not. {callers} and multi-token prediction call it.
- The part is cloned as clone_scatter_output_in_embedding says, since a view
  keeps all rows until backward.
- Rows that are s / tp already, from a wrapper, are not scattered again.
{flagless}- A length that the tensor parallel size does not divide raises a ValueError
  with the remedy.
{changes}
A multimodal model sees no change: its own calls of the embedding return all
rows. Padding masks are not touched.
{tests}"""

_LEFT_ALONE = """\
- An embedding without the attribute scatter_to_sequence_parallel (a function)
  is left alone.{loud}
"""

_LOUD = """ {models} raise an AttributeError today:
  a loud error becomes a pass-through."""

_STEP = """\
- In the speculative step, hidden states of all rows go with embeddings of all
  rows, and those of s / tp rows with s / tp.
"""

_FAILS = """\
Its speculative step does not scatter, and fails where it joins embeddings and
hidden states: "Sizes of tensors must match except in dimension 2".
"""

_DEPRECATED = """
GPTModel takes critical bug fixes only. This is one, for its speculative step;
its own scatter becomes the shared one.
"""

_TESTS = {
    "padding": "The new test fails on the second rank without the change.\n",
    "scatter": """\
The new tests run on two ranks and compare loss, gradients and what the decoder
and the MTP layer are given, bitwise, with a model that scatters. They fail if
{sites} does not scatter,
if the part is a view, or if it is scattered twice.
""",
    "reduce_scatter": """\
The new tests count the collectives of the tensor parallel group, and fail if
the embeddings are all-reduced.
""",
}

_MOCKED = """
The test of the scatter in _get_embeddings keeps its cases. Its mock moves to
where the scatter is, with a group of two, and it gains the speculative step.
"""

_REDUCE_SCATTER = """\
For the decoder of a model built with scatter_embedding_sequence_parallel=False,
the word embeddings are all-reduced and then split. A model whose embedding
scatters pays one reduce-scatter, which sends half as much. For 32,768 tokens of
hidden size 4096 in bf16, on two H100s with NVLink, embedding takes 1.19 ms with
it and a copy of the part, and 1.41 ms with an all-reduce and no copy. (An
all-reduce works in place. With a reduce-scatter the part exists beside all rows
for a moment, which makes this call's peak higher by the part.)

LanguageModelEmbedding.forward and VocabParallelEmbedding.forward take an
optional argument that overrides, for one call, what they were built with.
scatter_embeddings uses it where the classes of both modules have the forward
that this library defines. A subclass's forward, or one put in the place of the
class's (wrapped by functools.wraps or not), does not get the argument, and its
output is scattered as before. Classes alone decide this, since the collectives
of all ranks must match: a forward set on an instance gets the argument, and a
forward set on an instance with a strict signature raises TypeError.

With the argument, the embedding does what it does in a model that scatters:
dropout acts on this rank's rows, learned positions are added before a scatter,
and hooks on either module see this rank's rows.
{inference}A length that the tensor parallel size does not divide is refused before any
collective, and rows that something inside of the call has scattered or added
are refused after it. Without the argument nothing changes.
{tests}"""

_INFERENCE = """\
In eval() with transformer_impl='inference_optimized' the embedding now takes
that implementation's reduce-scatter, as in a plain language model.
"""


def message(name: str, files: dict[str, str]) -> tuple[str, str]:
    """Write the subject and the text of a patch.

    Args:
        name: ``padding``, ``scatter`` or ``reduce_scatter``.
        files: the files of the tree before the patch, by their paths.

    Returns:
        tuple[str, str]: the subject; the text, which ends with a newline.
    """
    models = f"GPTModel and {'HybridModel' if core.HYBRID in files else 'MambaModel'}"
    decoders = "not self.embedding.scatter_to_sequence_parallel" in files[core.GPT]
    training = 'embedding, "scatter_to_sequence_parallel", True' in files[core.MTP]
    step = "def forward_single_position" in files[core.MTP]
    today, changes, loud = "", "", ""
    if decoders:
        today = f"\nToday {models} scatter by themselves, and hand on a view.\n"
        loud = _LOUD.format(models=models)
    else:
        today = f"\nToday {models} do not, and run on all rows on every rank.\n"
    if training:
        today += "Multi-token prediction does so in training, and hands on a view.\n"
    else:
        today += "Multi-token prediction does not scatter in training.\n"
    if step:
        today += _FAILS if training else "Its speculative step does not scatter.\n"
        changes += _STEP
    if "only accepting critical bug fixes" in files[core.GPT]:
        changes += _DEPRECATED
    tests = ""
    if core.EMBEDDING_TESTS in files:
        # The tests build no MambaModel.
        sites = f"{models.replace(' and', ',')} or" if core.HYBRID in files else "GPTModel or"
        sites += " one of MTP's two calls" if step else " multi-token prediction"
        tests = "\n" + _TESTS[name].format(sites=sites)
        tests += _MOCKED if name == "scatter" and training else ""
    text = {"padding": _PADDING, "scatter": _SCATTER, "reduce_scatter": _REDUCE_SCATTER}[name]
    return _SUBJECTS["step" if name == "scatter" and step else name], text.format(
        models=models,
        callers=models.replace(" and", ","),
        today=today,
        flagless=_LEFT_ALONE.format(loud=loud),
        changes=changes,
        inference=_INFERENCE if "inference_optimized" in files[core.LAYERS] else "",
        tests=tests,
    )
