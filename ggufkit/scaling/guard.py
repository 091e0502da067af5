"""Proof that a fold kept the function: original and folded model side by side.

Both run over the same text in float32, block by block, each block's weights
being read once and folded exactly as they will be written. What is compared is
what the model is for: the distributions over the next token.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import IntegrityError
from ggufkit.scaling.families import Family
from ggufkit.scaling.fold import Scales, changes_of
from ggufkit.scaling.streaming import LoadedBlock, streamed_model

if TYPE_CHECKING:
    import torch

LIMIT = 5e-5
"""Mean KL divergence, in nats, above which a fold is not published."""
POSITIONS = 128
"""Positions of a sequence that are compared: enough for a mean of such size."""


def fold_divergence(
    index: CheckpointIndex,
    family: Family,
    scales: Scales,
    sequences: "torch.Tensor",
    *,
    scratch: Path,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Mean KL divergence of the folded model from the original, in nats per token.

    Args:
        index: the original checkpoint.
        family: its family.
        scales: what would be folded in.
        sequences: token ids that the search did not see, int64, shape
            (sequences, tokens).
        scratch: a directory for hidden states that are too many for memory.
        dtype: what changed tensors would be stored in; None for their own.
        trust_remote_code: let transformers run the checkpoint's own code.
    """
    import torch

    changes = changes_of(index, family, scales, dtype)
    count, length = sequences.shape
    positions = torch.arange(length // 4, length)[:: max(1, length // POSITIONS)]

    def each(block: LoadedBlock, hidden: "torch.Tensor") -> "torch.Tensor":
        """Run the first half as it is and the second with scales folded in."""
        block.forward(hidden, slice(0, count))
        for name, weight in block.weights.items():
            if change := changes.get(name):
                # Rounded to the dtype of the file, as the file will have it.
                weight.copy_(change(weight))
        return block.forward(hidden, slice(count, 2 * count))

    with streamed_model(index, family, scratch, trust_remote_code=trust_remote_code) as model:
        logits = model.logits(sequences.repeat(2, 1), each, positions)
    original, folded = logits.chunk(2)
    pairs = zip(original.flatten(0, 1), folded.flatten(0, 1), strict=True)
    return math.fsum(_divergence(p, q) for p, q in pairs) / (count * len(positions))


def _divergence(original: "torch.Tensor", folded: "torch.Tensor") -> float:
    p, q = original.double().log_softmax(-1), folded.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def require_same_function(divergence: float, name: str) -> None:
    """Refuse a fold that changed the function.

    Raises:
        IntegrityError: if the divergence is above :data:`LIMIT` or not a number.
    """
    if not divergence <= LIMIT:
        raise IntegrityError(
            f"folding scales into {name} changed what the model computes: mean KL divergence "
            f"{divergence:.2e} nats per token on held-back text, at most {LIMIT:.0e} is allowed",
            "Nothing was published. Convert without --awq, and report the architecture",
        )
