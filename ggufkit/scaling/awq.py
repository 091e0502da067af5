"""The AWQ search over a whole model, for several types in one pass.

Each requested type has a plan (which ggml type each tensor will get) and a
directory of its own. Scales are kept per block as they are found, so a killed
search goes on at the next block and ends with the same bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.progress import Progress
from ggufkit.scaling.families import Family, Group
from ggufkit.scaling.fold import block_count, read_scales, scale_name, sharing, write_scales
from ggufkit.scaling.search import Found, GroupObjective, search_group
from ggufkit.scaling.statistics import BlockVisit, visit_blocks
from ggufkit.values import Json

if TYPE_CHECKING:
    import torch

SCALES_FILE = "scales.safetensors"


@dataclass(frozen=True)
class Job:
    """One search: where its scales go and which types its tensors will get.

    Attributes:
        directory: takes ``scales.safetensors``, and scratch while at work.
        plan: checkpoint tensor name to ggml type, for the tensors quantized.
    """

    directory: Path
    plan: Mapping[str, str]


def search_scales(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    jobs: Sequence[Job],
    ggml: Ggml,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Json]:
    """Search scales for all jobs in one pass over the calibration sequences.

    Args:
        index: the checkpoint.
        family: its family.
        sequences: token ids, int64, shape (sequences, tokens).
        jobs: the searches.
        ggml: the quantizer.
        progress: told block by block.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        Facts by the name of the job's directory: the summed objective without
        and with scales, the number of groups and of those left alone.
    """
    blocks = block_count(index)
    workers = [_Worker(index, family, job, ggml) for job in jobs]
    with progress.task("AWQ search", blocks, "blocks") as task:

        def visit(block: BlockVisit) -> None:
            for worker in workers:
                if not worker.has(block.number):
                    worker.search(block)
            task.update(block.number + 1)

        visit_blocks(
            index,
            family,
            sequences,
            visit,
            wanted=lambda number: not all(w.has(number) for w in workers),
            trust_remote_code=trust_remote_code,
        )
    return {worker.job.directory.name: worker.finish(blocks) for worker in workers}


class _Worker:
    """One job's search, block by block."""

    def __init__(self, index: CheckpointIndex, family: Family, job: Job, ggml: Ggml) -> None:
        self.job = job
        self._index = index
        self._family = family
        self._ggml = ggml
        self._scratch = job.directory / ".blocks"
        self._scratch.mkdir(parents=True, exist_ok=True)

    def _block_file(self, number: int, suffix: str = ".safetensors") -> Path:
        return self._scratch / f"{number:05d}{suffix}"

    def has(self, number: int) -> bool:
        return self._block_file(number).exists()

    def search(self, visit: BlockVisit) -> None:
        scales = {}
        losses = []
        for group in self._family.groups:
            found = self._search_group(visit, group)
            losses.append([found.loss_plain, found.loss])
            shared = sharing(self._index, group)
            scales[scale_name(self._family, visit.number, group)] = (
                found.scales if shared is None else _per_producer(found.scales, shared)
            )
        self._block_file(visit.number, ".json").write_text(json.dumps(losses), encoding="utf-8")
        scratch = self._block_file(visit.number, ".tmp")
        write_scales(scratch, scales)
        scratch.replace(self._block_file(visit.number))

    def _search_group(self, visit: BlockVisit, group: Group) -> Found:
        weights = [visit.weights[f"{consumer}.weight"] for consumer in group.consumers]
        names = [self._family.tensor(visit.number, consumer) for consumer in group.consumers]
        kinds = [self._ggml.type(self.job.plan.get(name, "f32")) for name in names]
        statistics = visit.statistics[group.name]
        objective = GroupObjective(self._ggml, weights, kinds, statistics.gram)
        return search_group(objective, weights, statistics, sharing(self._index, group))

    def finish(self, blocks: int) -> dict[str, Json]:
        merged: dict[str, torch.Tensor] = {}
        losses: list[list[float]] = []
        for number in range(blocks):
            merged |= read_scales(self._block_file(number))
            losses += json.loads(self._block_file(number, ".json").read_text(encoding="utf-8"))
        write_scales(self.job.directory / SCALES_FILE, merged)
        return {
            "objective_plain": math.fsum(plain for plain, _ in losses),
            "objective": math.fsum(loss for _, loss in losses),
            "groups": len(losses),
            "groups_left_alone": sum(plain == loss for plain, loss in losses),
        }


def _per_producer(scales: "torch.Tensor", shared: "torch.Tensor") -> "torch.Tensor":
    """One scale per output of the producer, from those of the consumers' inputs."""
    import torch

    return torch.empty(int(shared.max()) + 1).index_copy_(0, shared, scales)
