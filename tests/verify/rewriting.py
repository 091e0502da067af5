"""GGUFs with something changed, as a faulty converter would write them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Change = Callable[[npt.NDArray[Any]], npt.NDArray[Any] | None]
"""Gives a tensor's new values, shape as torch has it; None to leave the tensor out."""


def rewrite(
    source: Path,
    out: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Change] | None = None,
    added: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Path:
    """A copy of a float GGUF with other metadata or tensors.

    Args:
        source: the GGUF.
        out: the copy.
        keys: new values of keys, None to leave one out; truth values may be added.
        tensors: what becomes of tensors, by name.
        added: further tensors.
    """
    keys, tensors = dict(keys or {}), dict(tensors or {})
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = keys.pop(field.name, field.contents())
        if value is not None:
            kinds = field.types
            writer.add_key_value(field.name, value, kinds[0], *kinds[-1:] * (len(kinds) > 1))
    for name, flag in keys.items():
        assert isinstance(flag, bool), f"the file has no {name}"
        writer.add_bool(name, flag)
    for tensor in reader.tensors:
        values: npt.NDArray[Any] | None = np.array(tensor.data)
        if change := tensors.pop(tensor.name, None):
            values = change(np.array(tensor.data))
        if values is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    assert not tensors, f"the file has no {', '.join(tensors)}"
    for name, values in (added or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
