"""Which ggml type each matrix of a file has."""

import re
from collections import Counter

from ggufkit.evaluate.report.values import TypeMap, TypePart, TypeRow
from ggufkit.llamacpp.blocks import TYPE_SIZES
from ggufkit.values import GGUFFile

_IN_BLOCK = re.compile(r"^(?P<stack>.+\.)?blk\.(?P<block>\d+)\.(?P<role>.+?)(?:\.weight|\.bias)?$")


def type_map(header: GGUFFile) -> TypeMap:
    """The map of a file: roles down, blocks across."""
    cells: dict[str, dict[int, str]] = {}
    others: dict[str, str] = {}
    vectors = 0
    for tensor in header.tensors:
        if len(tensor.shape) < 2:
            vectors += 1
            continue
        found = _IN_BLOCK.match(tensor.name)
        if found:
            role = (found["stack"] or "") + found["role"]
            cells.setdefault(role, {})[int(found["block"])] = tensor.type
        else:
            others[tensor.name.removesuffix(".weight")] = tensor.type
    blocks = tuple(sorted({block for row in cells.values() for block in row}))
    return TypeMap(
        blocks=blocks,
        rows=tuple(
            TypeRow(role, tuple(row.get(block, "") for block in blocks))
            for role, row in cells.items()
        ),
        others=others,
        vectors=vectors,
        parts=_parts(header),
    )


def _parts(header: GGUFFile) -> tuple[TypePart, ...]:
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in header.tensors:
        tensors[tensor.type] += 1
        parameters[tensor.type] += tensor.parameters
        nbytes[tensor.type] += tensor.nbytes
    parts = (TypePart(t, tensors[t], parameters[t], nbytes[t]) for t in tensors if nbytes[t])
    return tuple(sorted(parts, key=lambda part: (part.bits, part.type)))


def bits_of(type: str) -> float:
    """Bits per weight of a ggml type."""
    elements, nbytes = TYPE_SIZES[type]
    return 8 * nbytes / elements
