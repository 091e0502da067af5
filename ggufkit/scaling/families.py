"""The families whose scales can be folded exactly: one row each.

A row says which operation of a block is followed by which linear maps, so that
its output can be divided by s while their columns are multiplied by s. Names
are those of the checkpoint's tensors, without block and parameter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ggufkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    Rows = Callable[["AttentionShape", int], torch.Tensor]
    Spread = Callable[["AttentionShape"], torch.Tensor]

EXPERT = "{expert}"
"""Stands for the number of an expert in a name."""


@dataclass(frozen=True)
class AttentionShape:
    """What the fold has to know about attention.

    Attributes:
        query_heads: number of query heads.
        kv_heads: number of key/value heads.
        value_dim: width of a head in values.
    """

    query_heads: int
    kv_heads: int
    value_dim: int


@dataclass(frozen=True)
class Group:
    """One set of scales inside a block.

    Attributes:
        name: short name, used in files and reports.
        producer: what makes the input, and is divided by s: a norm with a
            weight, or a linear map (rows of the weight, and bias).
        consumers: all that read that output: linear maps, routers included.
        rows: which outputs of the producer it is about, out of so many, for a
            map that makes other things too; int64, shape (scales,). None: all.
        spread: which scale each input of the consumers takes, where several
            take the same; int64, shape (inputs,). None: each its own.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    rows: "Rows | None" = None
    spread: "Spread | None" = None


@dataclass(frozen=True)
class Experts:
    """Where the experts of a mixture are.

    Attributes:
        path: checkpoint name of one expert, with ``{expert}`` for its number.
        gate, up, down: names of its maps.
        module: what holds all experts in transformers (5 and later), which
            keeps gate and up of all of them in one tensor, and down in another.
    """

    path: str
    gate: str
    up: str
    down: str
    module: str = "mlp.experts"


@dataclass(frozen=True)
class Family:
    """An architecture: where its blocks are and which groups they have.

    Attributes:
        architectures: class names, as in ``config.json``.
        blocks: path of the list of blocks.
        groups: the groups; a block has those whose tensors it has.
        norm_offset: what the model adds to a norm's weight before it multiplies.
        transposed: whether linear maps keep their weights as (inputs, outputs).
        experts: where its experts are, if it has any.
        renamed: prefixes of module names that are spelled otherwise in files.
        when: whether a config is of this row, where an architecture has several.
    """

    architectures: tuple[str, ...]
    blocks: str
    groups: tuple[Group, ...]
    norm_offset: float = 0.0
    transposed: bool = False
    experts: Experts | None = None
    renamed: Mapping[str, str] | None = None
    when: Callable[[Mapping[str, Any]], bool] = lambda _: True

    def tensor(self, block: int, module: str, parameter: str = "weight") -> str:
        """Checkpoint name of a parameter of a module inside a block."""
        return f"{self.blocks}.{block}.{module}.{parameter}"

    def in_file(self, name: str) -> str:
        """The checkpoint's spelling of a name inside a block, from the module's."""
        for module, file in (self.renamed or {}).items():
            if name.startswith(module):
                return file + name.removeprefix(module)
        return name

    def in_model(self, name: str) -> str:
        """The module's spelling of a name inside a block, from the checkpoint's."""
        for module, file in (self.renamed or {}).items():
            if name.startswith(file):
                return module + name.removeprefix(file)
        return name


def _kv_spread(shape: AttentionShape) -> "torch.Tensor":
    """Query head h reads key/value head h // (query_heads / kv_heads)."""
    import torch

    heads = torch.arange(shape.query_heads) // (shape.query_heads // shape.kv_heads)
    width = torch.arange(shape.value_dim)
    return (heads[:, None] * shape.value_dim + width).reshape(-1)


def _value_rows_last(shape: AttentionShape, outputs: int) -> "torch.Tensor":
    """Queries, keys and values one after the other in one map (Phi-3, GPT-2)."""
    import torch

    return torch.arange(outputs - shape.kv_heads * shape.value_dim, outputs)


def _value_rows_per_group(shape: AttentionShape, outputs: int) -> "torch.Tensor":
    """For each key/value head its queries, then key, then value (InternLM2)."""
    import torch

    return torch.arange(outputs).reshape(shape.kv_heads, -1)[:, -shape.value_dim :].reshape(-1)


def _value_rows_per_head(shape: AttentionShape, outputs: int) -> "torch.Tensor":
    """Each head's key part, then its value part (DeepSeek's kv_b_proj)."""
    import torch

    return torch.arange(outputs).reshape(shape.query_heads, -1)[:, -shape.value_dim :].reshape(-1)


def _second_half(_: AttentionShape, outputs: int) -> "torch.Tensor":
    """Gate, then up, in one map (Phi-3)."""
    import torch

    return torch.arange(outputs // 2, outputs)


_Q, _K, _V, _O = (f"self_attn.{x}_proj" for x in "qkvo")
_ATTN_IN = Group("attn_in", "input_layernorm", (_Q, _K, _V))
_ATTN_OUT = Group("attn_out", _V, (_O,), spread=_kv_spread)


def _gated(path: str, name: str, gate: str, up: str, down: str, norm: str) -> tuple[Group, Group]:
    """A gated MLP: act(gate)·up is linear in up, so up takes the scale of down's input."""
    return (
        Group(f"{name}_in", norm, (f"{path}.{gate}", f"{path}.{up}")),
        Group(f"{name}_out", f"{path}.{up}", (f"{path}.{down}",)),
    )


def _mlp(norm: str = "post_attention_layernorm") -> tuple[Group, Group]:
    return _gated("mlp", "mlp", "gate_proj", "up_proj", "down_proj", norm)


def _mixture(
    experts: Experts, router: str, shared: str = "", gates: tuple[str, ...] = ()
) -> tuple[Group, ...]:
    """A mixture of experts: its router reads the scaled input like all the rest.

    Args:
        experts: where they are.
        router: the map that chooses among them.
        shared: path of an MLP that every token takes, if there is one.
        gates: further maps that read the same input.
    """
    consumers = [router, f"{experts.path}.{experts.gate}", f"{experts.path}.{experts.up}"]
    groups = [
        Group("expert_out", f"{experts.path}.{experts.up}", (f"{experts.path}.{experts.down}",))
    ]
    if shared:
        consumers += [f"{shared}.gate_proj", f"{shared}.up_proj"]
        groups.append(Group("shared_out", f"{shared}.up_proj", (f"{shared}.down_proj",)))
    return (Group("moe_in", "post_attention_layernorm", (*consumers, *gates)), *groups)


_LLAMA = (_ATTN_IN, _ATTN_OUT, *_mlp())
_GEMMA_2 = (_ATTN_IN, _ATTN_OUT, *_mlp("pre_feedforward_layernorm"))
_EXPERTS = Experts(f"mlp.experts.{EXPERT}", "gate_proj", "up_proj", "down_proj")
_MIXTRAL = Experts(f"block_sparse_moe.experts.{EXPERT}", "w1", "w3", "w2")
_LATENT_ATTENTION = (
    Group("attn_in", "input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    Group("attn_in_q", "input_layernorm", (_Q, "self_attn.kv_a_proj_with_mqa")),
    Group("query", "self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    Group("key_value", "self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
    Group("attn_out", "self_attn.kv_b_proj", (_O,), rows=_value_rows_per_head),
)


def _parallel(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_parallel_residual"))


FAMILIES = (
    Family(
        # Qwen's biases of q and k stay; v's sits behind a producer, and is divided too.
        (
            *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
            *("MiniCPMForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM"),
        ),
        "model.layers",
        _LLAMA,
    ),
    Family(("GemmaForCausalLM",), "model.layers", _LLAMA, norm_offset=1.0),
    # Their norms after attention and MLP stay: what follows them is a sum.
    Family(("Gemma2ForCausalLM", "Gemma3ForCausalLM"), "model.layers", _GEMMA_2, norm_offset=1.0),
    Family(
        ("Phi3ForCausalLM",),
        "model.layers",
        (
            Group("attn_in", "input_layernorm", ("self_attn.qkv_proj",)),
            Group(
                *("attn_out", "self_attn.qkv_proj", (_O,)), rows=_value_rows_last, spread=_kv_spread
            ),
            Group("mlp_in", "post_attention_layernorm", ("mlp.gate_up_proj",)),
            Group("mlp_out", "mlp.gate_up_proj", ("mlp.down_proj",), rows=_second_half),
        ),
    ),
    # No norm before attention and MLP: their input is the residual stream itself.
    Family(("Olmo2ForCausalLM",), "model.layers", (_ATTN_OUT, _mlp()[1])),
    # Its MLP is not gated: no scale passes exactly through GELU.
    Family(
        ("GPT2LMHeadModel",),
        "transformer.h",
        (
            Group("attn_in", "ln_1", ("attn.c_attn",)),
            Group("attn_out", "attn.c_attn", ("attn.c_proj",), rows=_value_rows_last),
            Group("mlp_in", "ln_2", ("mlp.c_fc",)),
        ),
        transposed=True,
    ),
    Family(
        ("StableLmForCausalLM",), "model.layers", _LLAMA, when=lambda config: not _parallel(config)
    ),
    Family(
        ("StableLmForCausalLM",),
        "model.layers",
        (
            Group("attn_in", "input_layernorm", (_Q, _K, _V, "mlp.gate_proj", "mlp.up_proj")),
            *(_ATTN_OUT, _mlp()[1]),
        ),
        when=_parallel,
    ),
    # Attention and MLP side by side, both from one norm.
    Family(
        ("CohereForCausalLM", "Cohere2ForCausalLM"),
        "model.layers",
        (
            Group("attn_in", "input_layernorm", (_Q, _K, _V, "mlp.gate_proj", "mlp.up_proj")),
            *(_ATTN_OUT, _mlp()[1]),
        ),
    ),
    Family(
        ("InternLM2ForCausalLM",),
        "model.layers",
        (
            Group("attn_in", "attention_norm", ("attention.wqkv",)),
            Group(
                *("attn_out", "attention.wqkv", ("attention.wo",)),
                rows=_value_rows_per_group,
                spread=_kv_spread,
            ),
            *_gated("feed_forward", "mlp", "w1", "w3", "w2", "ffn_norm"),
        ),
    ),
    Family(
        ("MixtralForCausalLM",),
        "model.layers",
        (_ATTN_IN, _ATTN_OUT, *_mixture(_MIXTRAL, "block_sparse_moe.gate")),
        experts=_MIXTRAL,
        renamed={"mlp.": "block_sparse_moe."},
    ),
    Family(
        ("Qwen2MoeForCausalLM",),
        "model.layers",
        (
            *_LLAMA,
            *_mixture(_EXPERTS, "mlp.gate", "mlp.shared_expert", ("mlp.shared_expert_gate",)),
        ),
        experts=_EXPERTS,
    ),
    Family(
        ("Qwen3MoeForCausalLM",),
        "model.layers",
        (*_LLAMA, *_mixture(_EXPERTS, "mlp.gate")),
        experts=_EXPERTS,
    ),
    Family(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        "model.layers",
        (
            *_LATENT_ATTENTION,
            *_mlp(),
            *_mixture(_EXPERTS, "mlp.gate", "mlp.shared_experts"),
        ),
        experts=_EXPERTS,
    ),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model, by what its ``config.json`` says.

    Raises:
        CheckpointError: if there is no row for it; names the nearest.
    """
    architecture = next(iter(config.get("architectures") or ()), "none")
    known = [name for family in FAMILIES for name in family.architectures]
    for family in FAMILIES:
        if architecture in family.architectures and family.when(config):
            return family
    near = get_close_matches(architecture, known, 1, cutoff=0.0)[0]
    raise CheckpointError(
        f"AWQ does not know how to fold scales into '{architecture}' (nearest known: {near})",
        f"Convert without --awq, or use one of: {', '.join(dict.fromkeys(known))}",
    )
