"""Are the weights of a checkpoint quantized already? The tensors say, not the config.

Fine-tunes are often merged into floats and saved with the ``quantization_config``
of the model that they were trained from; nothing but names and dtypes of tensors
shows what the file holds.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ggufkit.errors import CheckpointError
from ggufkit.values import Json

SECTIONS = ("quantization_config", "compression_config")
"""Keys of ``config.json`` that describe quantized weights."""
_PACKED = (
    *(".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_shape", ".weight_zero_point"),
    *(".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_global_scale"),
    *(".absmax", ".quant_map", ".nested_absmax", ".SCB", ".weight_format"),
    *(".bitsandbytes__nf4", ".bitsandbytes__fp4", "_proj_blocks", "_proj_scales"),
)
"""Ends of names that GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes and MXFP4 give."""
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def packed_by_name(names: Iterable[str]) -> str:
    """The first tensor whose name shows that weights are quantized; empty if there is none."""
    return next((name for name in names if name.endswith(_PACKED)), "")


def section_of(config: Mapping[str, Json]) -> Json:
    """What a config says about quantization; None if nothing."""
    return next((config[key] for key in SECTIONS if config.get(key)), None)


def check_not_quantized(
    path: Path, config: Mapping[str, Json], tensors: Mapping[str, tuple[str, int]]
) -> None:
    """Refuse weights that are quantized already.

    Args:
        path: the checkpoint, for the message.
        config: its ``config.json``.
        tensors: dtype and number of dimensions by name; of an empty dtype only
            the name counts.

    Raises:
        CheckpointError: if some tensor is quantized; says by what method.
    """
    section = section_of(config)
    packed = packed_by_name(tensors)
    if section and not packed:
        packed = next(
            (n for n, (dtype, rank) in tensors.items() if rank > 1 and dtype not in _FLOATS | {""}),
            "",
        )
    if not packed:
        return
    found = section if isinstance(section, dict) else {}
    method = found.get("quant_method", "of an unnamed method")
    bits = f", {found['bits']} bits" if "bits" in found else ""
    raise CheckpointError(
        f"{path} is already quantized ({method}{bits}), as its tensor {packed} shows: "
        "quantizing again would add error to error",
        "Use the original model that this one was made from (its model card names it)",
    )
