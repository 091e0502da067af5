"""A whole model rounded with error feedback, block by block.

Two streams of hidden states go through the blocks: one of the model as it is, one
of the model as rounded so far. Each map is rounded for the inputs that it will get
behind the rounded maps before it, in its own block too (GPTQ's "true sequential"),
and towards the outputs that it has in the model as it is: with x the inputs of the
one and y those of the other, the best float map for y is

    W' = W + W E[(x - y) yᵀ] (E[y yᵀ] + damping)⁻¹

and W' is what gets rounded, so that errors of what came before are made up for as
far as this map can (GPTAQ, Li et al. 2025, has the same aim column by column).

What is found is kept per block, so a killed pass goes on at the next block and ends
with the same bytes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.checkpoint.config import required_size
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import IntegrityError
from ggufkit.foreign import writing
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.packing import format_of
from ggufkit.progress import Progress
from ggufkit.scaling.families import Family
from ggufkit.scaling.fold import Change
from ggufkit.scaling.gptq import Rounded, round_matrix
from ggufkit.scaling.groups import block_count
from ggufkit.scaling.statistics import is_linear, quick_products
from ggufkit.scaling.streaming import (
    HIDDEN_NBYTES_IN_MEMORY,
    TOKENS_AT_ONCE,
    LoadedBlock,
    StreamedModel,
    steps,
    streamed_model,
)
from ggufkit.values import Json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Bytes = npt.NDArray[np.uint8]

DRIFT_DAMPING = 0.3
"""Share of each diagonal entry added to E[y yᵀ] where errors before are made up for."""
RUNTIME_NBYTES = 700 << 20
"""Python with torch and transformers, and their buffers."""
_SUFFIX = ".rounded.safetensors"
_FORMAT = "ggufkit-rounded-1"


@dataclass(frozen=True)
class TensorReport:
    """How the rounding of one tensor went; see :class:`ggufkit.scaling.gptq.Rounded`."""

    name: str
    type: str
    loss: float
    loss_plain: float
    loss_importance: float
    rows: int
    rows_kept: int
    reason: str


def forecast(
    index: CheckpointIndex,
    family: Family,
    plan: Mapping[str, str],
    *,
    sequences: int,
    length: int,
) -> int:
    """Peak resident memory of :func:`round_model`, in bytes.

    Args:
        index: the checkpoint.
        family: its family.
        plan: ggml type by checkpoint name.
        sequences: number of calibration sequences.
        length: tokens of each.
    """
    blocks = [
        [t.shape for name, t in index.tensors.items() if name.startswith(f"{family.blocks}.{n}.")]
        for n in range(block_count(index))
    ]
    around = sum(math.prod(t.shape) for t in index.tensors.values()) - sum(
        math.prod(shape) for shapes in blocks for shape in shapes
    )
    # The block as it is and as rounded; of the largest map target, candidates and errors.
    weights = max(sum(map(math.prod, shapes)) for shapes in blocks) * 2
    largest = max(math.prod(shape) for shapes in blocks for shape in shapes) * 8
    # Moments, their damped copies and factors in double precision, and copies in single.
    squares = (8 * 6 + 4 * 4) * _widest(index, family, plan) ** 2
    width = required_size(index.config, "hidden_size", "n_embd")
    hidden = 4 * sequences * length * width
    step = 4 * 16 * TOKENS_AT_ONCE * width
    return (
        RUNTIME_NBYTES
        + 4 * (around + weights + largest)
        + squares
        + 2 * min(hidden, HIDDEN_NBYTES_IN_MEMORY)
        + min(hidden, step)
    )


def _widest(index: CheckpointIndex, family: Family, plan: Mapping[str, str]) -> int:
    """Inputs of the widest map of a block."""
    inputs = 0 if family.transposed else 1
    inside = [name for name in plan if name.startswith(f"{family.blocks}.")]
    return max((index.tensors[name].shape[inputs] for name in inside), default=0)


def round_model(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    plan: Mapping[str, str],
    directory: Path,
    ggml: Ggml,
    progress: Progress,
    *,
    threads: int,
    changes: Mapping[str, Change] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Json]:
    """Round the linear maps of all blocks.

    Args:
        index: the checkpoint.
        family: its family, for where its blocks are.
        sequences: token ids, int64, shape (sequences, tokens).
        plan: ggml type by checkpoint name, of the tensors to round; those that are
            no linear maps of a block are passed over.
        directory: takes the results, one file per block; read them with
            :func:`read_rounded`.
        ggml: the quantizer.
        progress: told block by block.
        threads: how many threads round rows.
        changes: what a fold of scales does to tensors; the model to round is the folded one.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        Facts: summed losses, and a report of each tensor.

    Raises:
        UsageError: if a type cannot be packed, before any work; names those that can.
    """
    inside = f"{family.blocks}."
    plan = {name: type for name, type in plan.items() if name.startswith(inside)}
    for type in plan.values():
        format_of(type)
    _require_text(index, family, sequences.numel(), plan, progress)
    directory.mkdir(parents=True, exist_ok=True)
    reports: list[TensorReport] = []
    blocks = block_count(index)
    with (
        progress.task("rounding", blocks, "blocks") as task,
        streamed_model(index, family, directory, trust_remote_code=trust_remote_code) as model,
    ):
        rounding = _ModelRounding(family, model, plan, changes or {}, directory, ggml, threads)

        def each(block: LoadedBlock, hidden: "torch.Tensor") -> "torch.Tensor":
            hidden = rounding.visit(block, hidden)
            reports.extend(rounding.reports(block.number))
            task.update(block.number + 1)
            return hidden

        model.run(sequences, each)
    for report in reports:
        if report.reason:
            progress.warn(f"{report.name} keeps ggml's rounding: {report.reason}")
    sound = [report for report in reports if not report.reason]
    return {
        "loss": math.fsum(report.loss for report in sound),
        "loss_plain": math.fsum(report.loss_plain for report in sound),
        "loss_importance": math.fsum(report.loss_importance for report in sound),
        "tensors": [asdict(report) for report in reports],
    }


def _require_text(
    index: CheckpointIndex, family: Family, tokens: int, plan: Mapping[str, str], progress: Progress
) -> None:
    """Say that a text is too short to tell one input of a map from another."""
    widest = _widest(index, family, plan)
    if tokens < widest:
        progress.warn(
            f"rounding looks at {tokens} tokens, but the widest map has {widest} inputs: "
            f"errors will fit this text more than others; take more --calibration-samples"
        )


def read_rounded(directory: Path) -> "Iterator[tuple[str, Bytes]]":
    """Names in the checkpoint, and blocks: uint8, shape (rows, bytes of a row).

    Rows are those of the linear map, outputs first, in the checkpoint's order.

    Raises:
        IntegrityError: if a file is not one that :func:`round_model` wrote.
    """
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        yield from read_block(path).items()


def block_file(directory: Path, number: int) -> Path:
    """Where the rounded maps of a block lie."""
    return directory / f"{number:05d}{_SUFFIX}"


def read_block(path: Path) -> "dict[str, Bytes]":
    """The rounded maps of a block by their names in the checkpoint; see :func:`read_rounded`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise IntegrityError(f"{path} does not hold rounded tensors of ggufkit")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read as rounded tensors: {error}") from error


def write_block(path: Path, packed: "Mapping[str, Bytes]") -> None:
    """Write such a file, whole or not at all; the same blocks give the same bytes."""
    from safetensors.numpy import save_file

    scratch = path.with_name(f".{path.name}.tmp")
    ordered = {name: packed[name] for name in sorted(packed)}
    with writing(path):
        save_file(ordered, scratch, metadata={"format": _FORMAT})
    scratch.replace(path)


def fold_block(block: LoadedBlock, changes: Mapping[str, Change]) -> None:
    """Do to the weights of a block what a fold of scales does to the checkpoint's."""
    for name, weight in block.weights.items():
        if change := changes.get(name):
            # Rounded to the dtype of the file, as the converter gets it.
            weight.copy_(change(weight))


@dataclass(frozen=True)
class BlockMap:
    """A linear map of a block.

    Attributes:
        path: inside the block's module.
        name: in the checkpoint.
        type: ggml type to round to.
    """

    path: str
    name: str
    type: str


class _ModelRounding:
    """The pass over the blocks, and what it keeps."""

    def __init__(
        self,
        family: Family,
        model: StreamedModel,
        plan: Mapping[str, str],
        changes: Mapping[str, Change],
        directory: Path,
        ggml: Ggml,
        threads: int,
    ) -> None:
        self._family = family
        self._model = model
        self._plan = plan
        self._changes = changes
        self._directory = directory
        self._ggml = ggml
        self._threads = threads
        self._original: torch.Tensor | None = None

    def _report_file(self, number: int) -> Path:
        return self._directory / f"{number:05d}.json"

    def reports(self, number: int) -> list[TensorReport]:
        """How the tensors of a block that was visited went."""
        told = json.loads(self._report_file(number).read_text(encoding="utf-8"))
        return [TensorReport(**report) for report in told]

    def visit(self, block: LoadedBlock, hidden: "torch.Tensor") -> "torch.Tensor":
        """Round a block, and run both streams through it."""
        if self._original is None:
            self._original = self._model.hold(hidden.clone())
        fold_block(block, self._changes)
        maps = maps_of(self._family, block, self._plan)
        work = _BlockRounding(block, maps, hidden, self._original, self._family.transposed)
        path = block_file(self._directory, block.number)
        if path.exists():
            packed = read_block(path)
            for map in maps:
                columns = work.weight(map).shape[1]
                kind = self._ggml.type(map.type)
                work.replace(map, self._ggml.dequantize(kind, packed[map.name], columns))
        else:
            self._write(block.number, self._round(work, maps))
        with quick_products():
            work.use_original()
            self._original = block.forward(self._original)
            work.use_rounded()
            return block.forward(hidden)

    def _round(self, work: "_BlockRounding", maps: Sequence[BlockMap]) -> "dict[BlockMap, Rounded]":
        found: dict[BlockMap, Rounded] = {}
        for stage in work.stages(maps):
            with quick_products():
                moment, drift = work.moments(stage[0])
            correction = _correction(moment, drift)
            for map in stage:
                weight = work.weight(map)
                found[map] = round_matrix(
                    self._ggml,
                    map.type,
                    weight,
                    moment,
                    target=weight + weight @ correction,
                    threads=self._threads,
                )
                work.replace(map, found[map].values.numpy())
        return found

    def _write(self, number: int, found: "Mapping[BlockMap, Rounded]") -> None:
        reports = [
            TensorReport(
                map.name,
                map.type,
                rounded.loss,
                rounded.loss_plain,
                rounded.loss_importance,
                len(rounded.packed),
                rounded.rows_kept,
                rounded.reason,
            )
            for map, rounded in found.items()
        ]
        told = json.dumps([asdict(report) for report in reports])
        self._report_file(number).write_text(told, encoding="utf-8")
        packed = {map.name: rounded.packed for map, rounded in found.items()}
        write_block(block_file(self._directory, number), packed)


def maps_of(family: Family, block: LoadedBlock, plan: Mapping[str, str]) -> list[BlockMap]:
    """The linear maps of a block that a plan names."""
    maps = []
    for path, module in block.module.named_modules():
        name = family.tensor(block.number, family.in_file(path))
        if is_linear(module) and name in block.weights and name in plan:
            maps.append(BlockMap(path, name, plan[name]))
    return maps


def _correction(moment: "torch.Tensor", drift: "torch.Tensor") -> "torch.Tensor":
    """What W is multiplied by to make up for the drift of its inputs.

    Args:
        moment: E[y yᵀ], float64.
        drift: E[(x - y) yᵀ], float64.
    """
    import torch

    damped = moment.clone()
    diagonal = damped.diagonal()
    if not bool(damped.isfinite().all() & drift.isfinite().all() & (diagonal > 0).any()):
        return torch.zeros_like(moment, dtype=torch.float32)
    diagonal.clamp_(min=1e-6 * float(diagonal.mean()))
    diagonal.mul_(1 + DRIFT_DAMPING)
    solved: torch.Tensor = torch.linalg.solve(damped, drift.T)
    return solved.T.float()


class _BlockRounding:
    """One block with both sets of weights and both streams.

    Args:
        block: the block, loaded.
        maps: those to round.
        hidden: what comes in from the rounded blocks before.
        original: what comes in from those as they are.
        transposed: whether maps keep their weights as (inputs, outputs).
    """

    def __init__(
        self,
        block: LoadedBlock,
        maps: Sequence[BlockMap],
        hidden: "torch.Tensor",
        original: "torch.Tensor",
        transposed: bool,
    ) -> None:
        self._block = block
        self._hidden = hidden
        self._original_hidden = original
        self._transposed = transposed
        self._original = {map.path: block.weights[map.name] for map in maps}
        self._rounded = dict(self._original)

    def weight(self, map: BlockMap) -> "torch.Tensor":
        """The original weight, shape (outputs, inputs)."""
        weight = self._original[map.path]
        return weight.T.contiguous() if self._transposed else weight

    def replace(self, map: BlockMap, values: "npt.NDArray[np.float32]") -> None:
        """Use a rounded weight, shape (outputs, inputs), from now on."""
        import torch

        weight = torch.from_numpy(values)
        self._rounded[map.path] = weight.T.contiguous() if self._transposed else weight
        self.use_rounded()

    def use_original(self) -> None:
        """Put the original weights in."""
        self._use(self._original)

    def use_rounded(self) -> None:
        """Put the weights in as far as they are rounded."""
        self._use(self._rounded)

    def _use(self, weights: "Mapping[str, torch.Tensor]") -> None:
        import torch

        for path, weight in weights.items():
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            self._block.module.get_submodule(path).weight = parameter

    def stages(self, maps: Sequence[BlockMap]) -> list[list[BlockMap]]:
        """The maps in the order in which they are used, those of one input together."""
        stages: list[list[BlockMap]] = []
        inputs: list[torch.Tensor] = []

        def watch(map: BlockMap, x: "torch.Tensor") -> None:
            if any(map in stage for stage in stages):
                return
            for stage, seen in zip(stages, inputs, strict=True):
                if seen is x:
                    stage.append(map)
                    return
            stages.append([map])
            inputs.append(x)

        watches = [
            self._block.module.get_submodule(map.path).register_forward_pre_hook(
                lambda _, args, map=map: watch(map, args[0])
            )
            for map in maps
        ]
        try:
            first = self._hidden[:1].clone()
            self._block.step(first, slice(0, 1), len(self._hidden))
        finally:
            for handle in watches:
                handle.remove()
        return stages

    def moments(self, map: BlockMap) -> "tuple[torch.Tensor, torch.Tensor]":
        """E[y yᵀ] and E[(x - y) yᵀ] of a map's inputs, float64."""
        import torch

        width = self.weight(map).shape[1]
        moment, drift = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        tokens = 0
        for part in steps(self._hidden):
            y = self._block.input_of(map.path, self._hidden, part).float()
            self.use_original()
            x = self._block.input_of(map.path, self._original_hidden, part).float()
            self.use_rounded()
            moment += y.T @ y
            drift += (x - y).T @ y
            tokens += len(y)
        return moment / tokens, drift / tokens
