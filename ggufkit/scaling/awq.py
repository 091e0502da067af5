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
from ggufkit.scaling.families import Family
from ggufkit.scaling.fold import CLIP, read_scales, write_scales
from ggufkit.scaling.groups import BlockGroup, block_count
from ggufkit.scaling.importance import IMPORTANCE_FILE, read_importance, write_importance
from ggufkit.scaling.search import Found, GroupObjective, search_group
from ggufkit.scaling.statistics import BlockVisit, InputSquares, visit_blocks
from ggufkit.values import Json

if TYPE_CHECKING:
    import torch

SCALES_FILE = "scales.safetensors"


@dataclass(frozen=True)
class Job:
    """One search: where its scales go and which types its tensors will get.

    Attributes:
        directory: takes ``scales.safetensors`` and ``importance.safetensors``,
            and scratch while at work.
        plan: checkpoint tensor name to ggml type, for the tensors quantized.
        importance: whether they will be quantized with an importance matrix.
        exact: whether scales have to be powers of two, which fold into 16-bit
            floats without rounding.
        clip: whether to clip weights too, which changes the function.
    """

    directory: Path
    plan: Mapping[str, str]
    importance: bool = False
    exact: bool = False
    clip: bool = False


def search_scales(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    jobs: Sequence[Job],
    ggml: Ggml,
    progress: Progress,
    *,
    token_weights: "Mapping[str, torch.Tensor] | None" = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Json]]:
    """Search scales for all jobs in one pass over the calibration sequences.

    Args:
        index: the checkpoint.
        family: its family.
        sequences: token ids, int64, shape (sequences, tokens).
        jobs: the searches.
        ggml: the quantizer.
        progress: told block by block.
        token_weights: how often each token counts, by name of the group.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        Facts by the name of the job's directory: the summed objective without
        and with scales, the number of groups and of those left alone.
    """
    blocks = block_count(index)
    workers = [_Worker(family, job, ggml) for job in jobs]
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
            scratch=jobs[0].directory,
            wanted=lambda number: not all(w.has(number) for w in workers),
            token_weights=token_weights,
            trust_remote_code=trust_remote_code,
        )
    return {worker.job.directory.name: worker.finish(blocks) for worker in workers}


class _Worker:
    """One job's search, block by block."""

    def __init__(self, family: Family, job: Job, ggml: Ggml) -> None:
        self.job = job
        self._family = family
        self._ggml = ggml
        self._scratch = job.directory / ".blocks"
        self._scratch.mkdir(parents=True, exist_ok=True)

    def _block_file(self, number: int, what: str) -> Path:
        return self._scratch / f"{number:05d}.{what}"

    def has(self, number: int) -> bool:
        return self._block_file(number, SCALES_FILE).exists()

    def search(self, visit: BlockVisit) -> None:
        scales, losses = {}, []
        for group in visit.groups:
            found, limits = self._search_group(visit, group)
            losses.append([found.loss_plain, found.loss])
            scales[group.name] = found.scales
            scales |= {group.consumers[n] + CLIP: limit for n, limit in limits.items()}
        self._block_file(visit.number, "json").write_text(json.dumps(losses), encoding="utf-8")
        write_importance(self._block_file(visit.number, IMPORTANCE_FILE), visit.squares())
        scratch = self._block_file(visit.number, "tmp")
        write_scales(scratch, scales)
        scratch.replace(self._block_file(visit.number, SCALES_FILE))

    def _search_group(
        self, visit: BlockVisit, group: BlockGroup
    ) -> "tuple[Found, dict[int, torch.Tensor]]":
        weights = [visit.weights[name] for name in group.consumers]
        if self._family.transposed:
            weights = [w.T.contiguous() for w in weights]
        kinds = [self._ggml.type(self.job.plan.get(name, "f32")) for name in group.consumers]
        statistics = visit.statistics(group)
        objective = GroupObjective(
            self._ggml, weights, kinds, statistics.gram, importance=self.job.importance
        )
        found = search_group(objective, weights, statistics, group, exact=self.job.exact)
        limits = objective.clip_limits(group.to_inputs(found.scales)) if self.job.clip else {}
        return found, limits

    def finish(self, blocks: int) -> dict[str, Json]:
        scales: dict[str, torch.Tensor] = {}
        importance: dict[str, InputSquares] = {}
        losses: list[list[float]] = []
        for number in range(blocks):
            scales |= read_scales(self._block_file(number, SCALES_FILE))
            importance |= read_importance(self._block_file(number, IMPORTANCE_FILE))
            losses += json.loads(self._block_file(number, "json").read_text(encoding="utf-8"))
        write_scales(self.job.directory / SCALES_FILE, scales)
        write_importance(self.job.directory / IMPORTANCE_FILE, importance)
        return {
            "objective_plain": math.fsum(plain for plain, _ in losses),
            "objective": math.fsum(loss for _, loss in losses),
            "groups": len(losses),
            "groups_left_alone": sum(plain == loss for plain, loss in losses),
            "rows_clipped": sum(
                int(limit.isfinite().sum()) for n, limit in scales.items() if n.endswith(CLIP)
            ),
        }
