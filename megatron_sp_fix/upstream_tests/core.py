# SPDX-License-Identifier: Apache-2.0
"""What the source form changes in megatron-core, patch by patch: data for `source.py`."""

from typing import NamedTuple, Union

GPT = "megatron/core/models/gpt/gpt_model.py"
HYBRID = "megatron/core/models/hybrid/hybrid_model.py"
MAMBA = "megatron/core/models/mamba/mamba_model.py"  # up to 0.17
MTP = "megatron/core/transformer/multi_token_prediction.py"
_MODULE = "megatron/core/models/common/language_module/language_module.py"
LAYERS = "megatron/core/tensor_parallel/layers.py"
EMBEDDING = "megatron/core/models/common/embeddings/language_model_embedding.py"
EMBEDDING_TESTS = "tests/unit_tests/models/test_base_embedding.py"


class Change(NamedTuple):
    """A piece of code that is replaced.

    Attributes:
        places: ``file: Class.method``, ``file: function`` or ``file:`` for all of it. More than one
            where releases differ, separated by `` or ``: the first that a tree has is changed.
        find: the code to replace, without regard to its formatting: a statement, an expression, a
            parameter list, ``def name``, ``class name``, the head of an ``if``, ``all`` of the
            place, or whole lines of a docstring.
        new: what takes its place, without the place's indentation; ``{old}`` is the old code, as it
            stands there. Empty: the statement goes, with the comment above it.
        done: what the place contains once it is changed.
        need: ``always`` once; ``every`` if the place may have the code more than once; ``present``
            if a release may lack the place; ``maybe`` if the place may lack the code.
    """

    places: str
    find: str
    new: str
    done: str
    need: str = "always"


class Import(NamedTuple):
    """Names that a file imports: ``file:``, the statements, and `need` as for a change."""

    places: str
    new: str
    need: str = "always"


_DECODER = f"{GPT}: GPTModel._preprocess or {GPT}: GPTModel.forward"  # forward in 0.12
_HYBRID_DECODER = (  # _preprocess in pull requests 4798 and 4942
    f"{HYBRID}: HybridModel._preprocess or {HYBRID}: HybridModel.forward or "
    f"{MAMBA}: MambaModel.forward"
)
_MTP_TRAINING = (  # the block's in 0.12 and 0.13
    f"{MTP}: MultiTokenPredictionLayer._get_embeddings or {MTP}: MultiTokenPredictionBlock.forward"
)
_MTP_STEP = f"{MTP}: MultiTokenPredictionLayer.forward_single_position"  # 0.17 on
_FORWARD = f"{EMBEDDING}: LanguageModelEmbedding.forward"
_WORDS = f"{LAYERS}: VocabParallelEmbedding.forward"

_PADDING_METHOD = '''\
{old}

def _zero_padding_rows(self, decoder_input: Tensor, padding_slice: slice) -> None:
    """Zero the embeddings of the padding tokens of a dynamic batch, in place.

    Args:
        decoder_input (Tensor): The embeddings, [s, b, h], or this rank's [s / tp, b, h].
        padding_slice (slice): The padding tokens, which end the batch, counted from its start.
    """
    rows = decoder_input.shape[0]
    # Fewer rows than tokens are this rank's part of them, under sequence parallelism.
    offset = self.tp_group.rank() * rows if rows < padding_slice.stop else 0
    decoder_input[max(padding_slice.start - offset, 0) : padding_slice.stop - offset] = 0.0'''

PADDING: tuple[Change, ...] = (
    *(
        Change(
            places,
            "decoder_input[inference_context.padding_slice] = 0.0",
            "self._zero_padding_rows(decoder_input, inference_context.padding_slice)",
            "self._zero_padding_rows(",
        )
        for places in (_DECODER, _HYBRID_DECODER)
    ),
    Change(
        f"{_MODULE}: LanguageModule",
        "def _is_in_embd_group",
        _PADDING_METHOD,
        "def _zero_padding_rows",
    ),
)

_SCATTER_EMBEDDINGS = '''\
{old}


def scatter_embeddings(
    embedding: Callable[..., Tensor],
    input_ids: Tensor,
    position_ids: Tensor,
    config: TransformerConfig,
    tp_group: Optional[torch.distributed.ProcessGroup] = None,
) -> Tensor:
    """Embed tokens for a decoder, which under sequence parallelism gets this rank's part of them.

    An embedding built with scatter_to_sequence_parallel=False returns the whole sequence, since a
    multimodal model inserts other embeddings before it scatters. A language model that embeds its
    own tokens has nobody to scatter for it.

    Args:
        embedding (Callable): The embedding. One without the attribute scatter_to_sequence_parallel
            is left alone: it returns what the decoder is meant to get.
        input_ids (Tensor): The token ids, [b, s].
        position_ids (Tensor): The position ids, [b, s].
        config (TransformerConfig): The model's config.
        tp_group (ProcessGroup, optional): The tensor parallel group. Defaults to the global one.

    Returns:
        Tensor: The embeddings, [s, b, h], or [s / tp, b, h] under sequence parallelism.
    """
    if not config.sequence_parallel or getattr(embedding, 'scatter_to_sequence_parallel', True):
        return embedding(input_ids=input_ids, position_ids=position_ids)
    tp_size = get_pg_size(get_tensor_model_parallel_group_if_none(tp_group))
    embeddings = embedding(input_ids=input_ids, position_ids=position_ids)
    # A wrapper may have scattered already what the embedding inside it returned.
    if input_ids is not None and embeddings.shape[0] * tp_size == input_ids.shape[-1]:
        return embeddings
    _check_length(embeddings.shape[0], tp_size)
    embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=tp_group)
    # The scattered part is a view, which keeps the whole sequence from being garbage collected.
    return embeddings.clone() if config.clone_scatter_output_in_embedding else embeddings


def _check_length(length: int, tp_size: int) -> None:
    if length % tp_size:
        raise ValueError(
            f"sequence length {length} is not divisible by the tensor parallel size {tp_size}: pad "
            f"it to {-(-length // tp_size) * tp_size} tokens, or set sequence_parallel=False"
        )'''

_SCATTER_IMPORTS = """\
from typing import Callable, Optional
from megatron.core.utils import get_pg_size, get_tensor_model_parallel_group_if_none"""

_EMBED = "decoder_input = {}(input_ids={}, position_ids=position_ids)"
_SCATTER = """\
decoder_input = scatter_embeddings(
    {}, {}, position_ids, self.config, self.tp_group
)"""
_STEP = """\
# Hidden states of all positions, not scattered, go with the embeddings of all positions.
if self.config.sequence_parallel and hidden_states.shape[0] == next_token_ids.shape[-1]:
    {old}
else:
    """ + _SCATTER.format("embedding", "next_token_ids").replace("\n", "\n    ")

SCATTER: tuple[Union[Change, Import], ...] = (
    Import(f"{EMBEDDING}:", _SCATTER_IMPORTS),
    Change(
        f"{EMBEDDING}:",
        "class LanguageModelEmbedding",
        _SCATTER_EMBEDDINGS,
        "def scatter_embeddings",
    ),
    *(
        Import(
            places,
            "from megatron.core.models.common.embeddings.language_model_embedding import "
            "scatter_embeddings",
        )
        for places in (f"{GPT}:", f"{HYBRID}: or {MAMBA}:", f"{MTP}:")
    ),
    *(
        Change(
            places,
            f"if self.config.sequence_parallel and not {flag}:",
            "",
            "scatter_embeddings(",
            "maybe",
        )
        for places, flag in (
            (_DECODER, "self.embedding.scatter_to_sequence_parallel"),
            (_HYBRID_DECODER, "self.embedding.scatter_to_sequence_parallel"),
            (_MTP_TRAINING, "getattr(embedding, 'scatter_to_sequence_parallel', True)"),
        )
    ),
    *(
        Change(
            places,
            _EMBED.format(embedding, "input_ids"),
            _SCATTER.format(embedding, "input_ids"),
            "scatter_embeddings(",
        )
        for places, embedding in (
            (_DECODER, "self.embedding"),
            (_HYBRID_DECODER, "self.embedding"),
            (_MTP_TRAINING, "embedding"),
        )
    ),
    Change(
        _MTP_STEP,
        _EMBED.format("embedding", "next_token_ids"),
        _STEP,
        "scatter_embeddings(",
        "present",
    ),
)

#: What must not be left: a scatter of what the function has scattered.
SCATTERED_AGAIN = r"decoder_input = [\w.]*scatter_to_sequence_parallel_region\(\s*decoder_input"

_WITH_SCATTER = """\
if scatter_to_sequence_parallel is None:
    scatter = self.scatter_to_sequence_parallel
    reduce_scatter = self.reduce_scatter_embeddings
    {old}
else:
    scatter = scatter_to_sequence_parallel
    reduce_scatter = (
        scatter
        and not self.add_position_embedding
        and self.num_tokentypes <= 0
        and self.config.sequence_parallel
    )
    word_embeddings = self.word_embeddings(
        input_ids, reduce_scatter_embeddings=reduce_scatter
    )"""

_OWN_FORWARDS = """\
# As defined here: a forward that is put into the class later does not take the argument.
_EMBEDDING_FORWARD = LanguageModelEmbedding.forward
_WORD_EMBEDDING_FORWARD = tensor_parallel.VocabParallelEmbedding.forward


{old}"""

_REDUCE_SCATTER = """\
# Classes decide, not what is set on a module of one rank: the ranks' collectives must match.
if (
    getattr(type(embedding), 'forward', None) is _EMBEDDING_FORWARD
    and type(embedding.word_embeddings).forward is _WORD_EMBEDDING_FORWARD
):
    length = input_ids.shape[-1]
    _check_length(length, tp_size)
    embeddings = embedding(
        input_ids=input_ids, position_ids=position_ids, scatter_to_sequence_parallel=True
    )
    # A hook may gather the sequence. One that scatters or adds rows expects all of it before.
    if embeddings.shape[0] not in (length // tp_size, length):
        raise ValueError(
            f"the embedding returned {embeddings.shape[0]} rows of {length} tokens, not "
            f"{length // tp_size}, at tensor parallel size {tp_size}: let nothing inside of "
            "its call scatter or add rows"
        )
else:
    {old}"""

REDUCE_SCATTER = (
    Change(
        _WORDS,
        "self, input_",
        "{old}, reduce_scatter_embeddings: Optional[bool] = None",
        "reduce_scatter_embeddings: Optional",
    ),
    Change(
        _WORDS,
        "input_ (torch.Tensor): Input tensor.",
        "{old}\nreduce_scatter_embeddings (bool, optional): Whether to reduce-scatter the output.\n"
        "    Defaults to what the module was built with.",
        "reduce_scatter_embeddings (bool",
        "maybe",
    ),
    Change(
        _WORDS,
        "self.reduce_scatter_embeddings",
        "reduce_scatter_embeddings",
        "if reduce_scatter_embeddings:",
    ),
    Change(
        _WORDS,
        "if reduce_scatter_embeddings:",
        "if reduce_scatter_embeddings is None:\n"
        "    reduce_scatter_embeddings = self.reduce_scatter_embeddings\n{old}",
        "reduce_scatter_embeddings is None",
    ),
    Change(
        _FORWARD,
        "self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: int=None",
        "\n    self,\n    input_ids: Tensor,\n    position_ids: Tensor,\n"
        "    tokentype_ids: int = None,\n"
        "    scatter_to_sequence_parallel: Optional[bool] = None,\n",
        "scatter_to_sequence_parallel: Optional",
    ),
    Change(
        _FORWARD,
        "tokentype_ids (int): The token type ids. Used when args.bert_binary_head is set to True. "
        "Defaults to None",
        "{old}\nscatter_to_sequence_parallel (bool, optional): Whether to return this rank's part "
        "of\n    the sequence. Defaults to what the module was built with.",
        "scatter_to_sequence_parallel (bool",
        "maybe",
    ),
    Change(
        _FORWARD,
        "self.reduce_scatter_embeddings",
        "reduce_scatter",
        "if not reduce_scatter:",
        "every",
    ),
    Change(
        _FORWARD,
        "self.scatter_to_sequence_parallel",
        "scatter",
        "not reduce_scatter and scatter",
        "every",
    ),
    Change(
        _FORWARD,
        "word_embeddings = self.word_embeddings(input_ids)",
        _WITH_SCATTER,
        "scatter = scatter_to_sequence_parallel",
    ),
    Change(
        f"{EMBEDDING}: scatter_embeddings",
        "embeddings = embedding(input_ids=input_ids, position_ids=position_ids)",
        _REDUCE_SCATTER,
        "is _EMBEDDING_FORWARD",
    ),
    Change(
        f"{EMBEDDING}:",
        "def scatter_embeddings",
        _OWN_FORWARDS,
        "_EMBEDDING_FORWARD = LanguageModelEmbedding.forward",
    ),
)

_MTP_TESTS = "tests/unit_tests/transformer/test_multi_token_prediction.py"
_MOCKED = (
    f"{_MTP_TESTS}: TestMultiTokenPredictionLayer."
    "test_get_embeddings_scatters_when_embedding_does_not"
)

_STEP_TEST = """\
{old}

# The speculative step embeds by itself, for hidden states that are scattered.
monkeypatch.setattr(
    mtp_layer, "_proj_and_transformer_layer", lambda hidden_states, **kwargs: hidden_states
)
mtp_layer.forward_single_position(
    hidden_states=hidden_states[: seq_len // 2],
    next_token_ids=input_ids,
    position_ids=position_ids,
    embedding=embedding,
)
assert (len(scattered) == 2) is expect_scatter"""

#: megatron-core's own test of #6256, where a tree has it: it mocks the statement replaced.
TESTS = (
    Change(
        _MOCKED,
        "monkeypatch.setattr('megatron.core.transformer.multi_token_prediction."
        "scatter_to_sequence_parallel_region', fake_scatter)",
        """monkeypatch.setattr(
    "megatron.core.models.common.embeddings.language_model_embedding."
    "tensor_parallel.scatter_to_sequence_parallel_region",
    fake_scatter,
)
mtp_layer.tp_group = types.SimpleNamespace(size=lambda: 2)""",
        "types.SimpleNamespace(size",
        "present",
    ),
    Change(
        _MOCKED,
        "assert (len(scattered) == 1) is expect_scatter",
        _STEP_TEST,
        "forward_single_position",
        "present",
    ),
)

#: The patches in their order, each with the file of its tests' name. The first is for trees that
#: have a ``padding_slice``.
PATCHES = {"padding": PADDING, "scatter": (*SCATTER, *TESTS), "reduce_scatter": REDUCE_SCATTER}

#: The files that are read, of which a tree has some.
PATHS = sorted(
    {EMBEDDING_TESTS}.union(
        place.split(":")[0]
        for changes in PATCHES.values()
        for change in changes
        for place in change.places.split(" or ")
    )
)

#: Where a file, or that which is changed, lacks a word: regular expressions, and what to write for
#: what they match.
VARIANTS = (
    # By the names that releases have for a model's own tensor parallel group, if it has one.
    (None, "self.tp_group = ", ((r", self\.tp_group", ", self.pg_collection.tp"),)),
    (None, "self.pg_collection.tp,", ((r", self\.pg_collection\.tp", ", self.model_comm_pgs.tp"),)),
    (None, "self.model_comm_pgs.tp,", ((r", self\.model_comm_pgs\.tp", ""),)),
    (
        EMBEDDING,
        "tp_group",  # only global process groups, in 0.12
        (
            (
                r"from megatron\.core\.utils import get_pg_size, [^\n]*",
                "from megatron.core import parallel_state",
            ),
            (r"    tp_group: Optional\[torch\.distributed\.ProcessGroup\] = None,\n", ""),
            (r"        tp_group \(ProcessGroup, optional\): [^\n]*\n", ""),
            (
                r"get_pg_size\(get_tensor_model_parallel_group_if_none\(tp_group\)\)",
                "parallel_state.get_tensor_model_parallel_world_size()",
            ),
            (r", group=tp_group", ""),
        ),
    ),
    (
        GPT,
        "InferenceMode",  # up to 0.17: an inference context and eval() are the mode
        (
            (r"from megatron\.core\.inference\.utils import InferenceMode\n?", ""),
            (r"with InferenceMode\.active\(\), torch\.no_grad\(\):", "with torch.no_grad():"),
        ),
    ),
    (
        HYBRID,
        "class HybridModel",  # the tests build no MambaModel
        (
            (r"from megatron\.core\.(models\.hybrid|transformer\.spec_utils)[^\n]*\n?", ""),
            (r"    if kind == 'hybrid':.*?(?=    layers = )", ""),
            (r"'gpt', 'hybrid'", "'gpt'"),
            (r" *\('hybrid', '\w+'\),\n", ""),
        ),
    ),
    (
        MTP,
        "def forward_single_position",
        ((r"    @pytest\.mark\.parametrize\('scattered'.*?(?=    def test_outer)", ""),),
    ),
)
