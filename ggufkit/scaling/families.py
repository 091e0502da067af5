"""The families whose scales can be folded exactly: one row each.

A row says which operation of a block is followed by which linear maps, so that
its output can be divided by s while their columns are multiplied by s.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from ggufkit.errors import CheckpointError


@dataclass(frozen=True)
class Group:
    """One set of scales inside a block.

    Attributes:
        name: short name, used in files and reports.
        producer: module whose output is divided by s: a norm with a weight, or
            a linear map (weight rows and bias).
        consumers: linear maps that read that output and nothing else does.
        per_kv_head: the producer is v_proj and the consumer o_proj, with each
            key/value head read by several query heads: they share their scales.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    per_kv_head: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture: where its blocks are and which groups they have."""

    architectures: tuple[str, ...]
    blocks: str
    groups: tuple[Group, ...]

    def tensor(self, block: int, module: str, parameter: str = "weight") -> str:
        """Checkpoint name of a parameter of a module inside a block."""
        return f"{self.blocks}.{block}.{module}.{parameter}"


_LLAMA_GROUPS = (
    Group(
        "attn_in", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ),
    Group("attn_out", "self_attn.v_proj", ("self_attn.o_proj",), per_kv_head=True),
    Group("mlp_in", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    # silu(gate)·up is linear in up, so up takes the scale of down's input.
    Group("mlp_out", "mlp.up_proj", ("mlp.down_proj",)),
)

FAMILIES = (
    Family(("LlamaForCausalLM", "MistralForCausalLM"), "model.layers", _LLAMA_GROUPS),
    # Biases of q, k and v: only v's sits behind a producer, and is divided too.
    Family(("Qwen2ForCausalLM",), "model.layers", _LLAMA_GROUPS),
)


def family_of(architecture: str) -> Family:
    """The family of an architecture, by its class name in ``config.json``.

    Raises:
        CheckpointError: if there is no row for it; names the nearest.
    """
    by_name = {name: family for family in FAMILIES for name in family.architectures}
    if found := by_name.get(architecture):
        return found
    near = get_close_matches(architecture, by_name, 1, cutoff=0.0)[0]
    raise CheckpointError(
        f"AWQ does not know how to fold scales into '{architecture}' (nearest known: {near})",
        f"Convert without --awq, or use one of: {', '.join(by_name)}",
    )
