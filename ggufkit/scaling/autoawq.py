"""Scales from AutoAWQ's own search, for whoever wants those rather than ours.

AutoAWQ (Lin et al. 2023 as Casper Hansen's package has it; deprecated, 0.2.9 is
the last) is used for its search alone. What it found is turned into scales of
ggufkit's families and folded by ggufkit, so that nothing else that AutoAWQ does
to a model can reach the checkpoint: no clipping, no ``quantization_config``, no
change of dtype, no fold that is not exact.

Its search weighs scales by what 4-bit integers with zero points in groups along
the rows do to a block's outputs, whatever GGUF type will be written. The model
is held in memory whole, in float32, and all sequences go through a block at once.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.checkpoint.tensors import TensorReader
from ggufkit.errors import CheckpointError, GgufkitError, IntegrityError, UsageError
from ggufkit.progress import Progress, Task
from ggufkit.scaling.families import Family
from ggufkit.scaling.groups import BlockGroup, all_groups, block_count
from ggufkit.scaling.streaming import load_finite

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (128, 64, 32)
"""Weights of a row that share a scale and a zero point; the first that divides is used."""
_WITHOUT = "Leave out --awq-backend: ggufkit's own search does not need AutoAWQ"


def autoawq_version() -> str:
    """Version of the AutoAWQ that is installed.

    Raises:
        UsageError: there is none; says how to install it.
    """
    try:
        return version("autoawq")
    except PackageNotFoundError:
        raise UsageError(
            "AutoAWQ is not installed", "Type: pip install 'ggufkit[autoawq]' (on Linux)"
        ) from None


def autoawq_scales(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    progress: Progress,
    *,
    bits: int = 4,
    trust_remote_code: bool = False,
) -> "dict[str, torch.Tensor]":
    """Let AutoAWQ search scales, with its own defaults but no clipping.

    Args:
        index: the checkpoint.
        family: its family.
        sequences: token ids, int64, shape (sequences, tokens); all are looked at.
        progress: told block by block.
        bits: of the integers that AutoAWQ rounds to.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        By the name of each group of the model: float32, shape (scales,). Ones
        for groups that AutoAWQ leaves out, such as v → o where query heads share
        key/value heads.

    Raises:
        UsageError: AutoAWQ is not installed, or cannot be loaded.
        CheckpointError: AutoAWQ does not know the architecture, its groups do
            not divide a tensor (named), a tensor is not finite (named), or it failed.
        IntegrityError: the search did not leave the weights as they were.
    """
    groups = all_groups(index, family)
    models, quantizing = _load_autoawq()
    model_class = _model_class(models, str(index.config.get("model_type")))
    size = _group_size(index, groups)
    found: list[_Found] = []

    def quantizer(*args: Any, **kwargs: Any) -> Any:
        made = quantizing.AwqQuantizer(*args, **kwargs)
        _require_all_seen(made.inps, sequences)
        made._search_best_scale = _WatchedSearch(made, found.append)
        return made

    with progress.task("AutoAWQ search", block_count(index), "blocks") as task:
        _require_finite(index)
        awq_model = _load_model(index, model_class, trust_remote_code)
        with _failures_named(index), _search_only(quantizing, task):
            awq_model.quantize(
                quant_config={"w_bit": bits, "q_group_size": size},
                calib_data=sequences.tolist(),
                # Longer samples would be dropped, and shorter ones joined and cut anew.
                max_calib_samples=sequences.shape[0],
                max_calib_seq_len=sequences.shape[1],
                export_compatible=True,
                apply_clip=False,
                quantizer_cls=quantizer,
            )
    return _by_group(family, groups, found, progress)


@dataclass(frozen=True)
class _Found:
    """Scales for the inputs of some maps of a block, named as modules inside it."""

    block: int
    maps: tuple[str, ...]
    scales: "torch.Tensor"


def _load_autoawq() -> tuple[Any, Any]:
    """AutoAWQ's module of models, and that of its quantizer."""
    autoawq_version()
    # Its import warns that it is deprecated, after telling Python to show such
    # warnings to everybody from then on.
    with warnings.catch_warnings(record=True):
        try:
            from awq.models import auto
            from awq.quantize import quantizer
        except ImportError as error:
            raise UsageError(f"AutoAWQ cannot be loaded: {error}", _WITHOUT) from error
    return auto, quantizer


def _model_class(models: Any, model_type: str) -> Any:
    known = models.AWQ_CAUSAL_LM_MODEL_MAP
    if model_type not in known:
        raise CheckpointError(f"AutoAWQ does not know models of type '{model_type}'", _WITHOUT)
    return known[model_type]


@contextmanager
def _search_only(quantizing: Any, task: Task) -> Iterator[None]:
    """Let AutoAWQ tell our task instead of drawing its bar, and scale no weights.

    The search does not miss the scaling, which AutoAWQ does not do exactly for
    every architecture: the inputs of a block come from unscaled blocks anyway.
    """

    def told(blocks: Iterable[int], **_: Any) -> Iterator[int]:
        for done, block in enumerate(blocks, 1):
            yield block
            task.update(done)

    def free_accelerator(block: Any, *_: Any, **__: Any) -> None:
        block.cpu()

    before = quantizing.tqdm, quantizing.apply_scale
    quantizing.tqdm, quantizing.apply_scale = told, free_accelerator
    try:
        yield
    finally:
        quantizing.tqdm, quantizing.apply_scale = before


class _WatchedSearch:
    """AutoAWQ's search for the scales of one group, on weights that it cannot spoil.

    It scales and rounds the weights in place, once per candidate, and takes them
    back from a state dict that it made with ``.cpu()``. On a CPU that copies
    nothing, so the scaling stayed, and added up.
    """

    def __init__(self, quantizer: Any, found: Callable[[_Found], None]) -> None:
        self._blocks = list(quantizer.modules)
        self._search = quantizer._search_best_scale
        self._found = found

    def __call__(
        self,
        module: Any,
        prev_op: Any,
        layers: Sequence[Any],
        inp: "torch.Tensor",
        module2inspect: Any = None,
        **rest: Any,
    ) -> tuple[str, tuple[str, ...], "torch.Tensor"]:
        """Search as AutoAWQ would; takes and returns what its method does."""
        inspected = layers[0] if module2inspect is None else module2inspect
        before = _digests(layers)
        with copied_state(inspected):
            producer, maps, scales = self._search(
                module, prev_op, layers, inp, module2inspect, **rest
            )
        block = next(n for n, other in enumerate(self._blocks) if other is module)
        if _digests(layers) != before:
            raise IntegrityError(
                f"AutoAWQ's search changed the weights of block {block} ({', '.join(maps)}): "
                "its scales are worthless",
                _WITHOUT,
            )
        self._found(_Found(block, tuple(maps), scales.float().cpu()))
        return producer, maps, scales


@contextmanager
def copied_state(module: Any) -> Iterator[None]:
    """Let ``module.state_dict()`` give copies of its tensors instead of views."""

    def copy(_: Any, state: dict[str, Any], *__: Any) -> None:
        state.update({name: value.clone() for name, value in state.items()})

    handle = module.register_state_dict_post_hook(copy)
    try:
        yield
    finally:
        handle.remove()


def _digests(layers: Sequence[Any]) -> list[bytes]:
    import torch

    weights = (layer.weight.detach().cpu().contiguous().view(torch.uint8) for layer in layers)
    return [hashlib.sha256(weight.numpy()).digest() for weight in weights]


def _group_size(index: CheckpointIndex, groups: Sequence[BlockGroup]) -> int:
    widths = {name: index.tensors[name].shape[1] for group in groups for name in group.consumers}
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths.values()):
            return size
    name, width = next((n, w) for n, w in widths.items() if w % GROUP_SIZES[-1])
    raise CheckpointError(
        f"{name} has {width} inputs, which AutoAWQ cannot cut into groups of {GROUP_SIZES[-1]}",
        _WITHOUT,
    )


def _require_finite(index: CheckpointIndex) -> None:
    """AutoAWQ would stop in the middle, and name nothing."""
    with TensorReader(index) as reader:
        for name in index.tensors:
            load_finite(reader, name)


def _load_model(index: CheckpointIndex, model_class: Any, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # float32 whatever the file has: losses of candidates lie close together.
        model = AutoModelForCausalLM.from_pretrained(
            index.path, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    # The search runs a block many times with the same arguments: a cache of keys
    # and values among them would grow with every run.
    model.config.use_cache = False
    return model_class(
        model.eval(),
        model.config.model_type,
        is_quantized=False,
        config=model.config,
        quant_config=None,
        processor=None,
    )


def _require_all_seen(inputs: "torch.Tensor", sequences: "torch.Tensor") -> None:
    if inputs.shape[:2] != sequences.shape:
        seen, given = (" x ".join(map(str, t.shape[:2])) for t in (inputs, sequences))
        raise GgufkitError(f"AutoAWQ looks at {seen} of {given} calibration tokens", _WITHOUT)


@contextmanager
def _failures_named(index: CheckpointIndex) -> Iterator[None]:
    """Whatever AutoAWQ stumbles over is told as what it is: not ours to repair."""
    try:
        yield
    except GgufkitError:
        raise
    except Exception as error:
        # Of the text only its start: torch's goes on with the whole block.
        told = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
        raise CheckpointError(
            f"AutoAWQ {autoawq_version()} fails on {index.architectures[0]} "
            f"with transformers {version('transformers')} ({told})",
            _WITHOUT,
        ) from error


def _by_group(
    family: Family, groups: Sequence[BlockGroup], found: Iterable[_Found], progress: Progress
) -> "dict[str, torch.Tensor]":
    """Scales for every group, from those that AutoAWQ found for inputs of maps.

    What makes those inputs is taken from the family, not from AutoAWQ, which
    names the wrong map for some architectures.
    """
    import torch

    scales = {group.name: torch.ones(group.width) for group in groups}
    by_maps = {frozenset(group.consumers): group for group in groups}
    unused = []
    for item in found:
        names = [family.tensor(item.block, family.in_file(name)) for name in item.maps]
        group = by_maps.get(frozenset(names))
        if group is None or not _own_scale_each(group):
            unused.append(names[0])
        else:
            scales[group.name] = group.from_inputs(item.scales)
    if unused:
        progress.warn(
            f"{len(unused)} of AutoAWQ's scales cannot be folded exactly and are left out, "
            f"the first for {unused[0]}"
        )
    return scales


def _own_scale_each(group: BlockGroup) -> bool:
    """Whether no inputs of the group have to share a scale."""
    return group.spread is None or len(group.spread) == group.width
