"""Sizes that a checkpoint's config states, checked before they are computed with."""

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError


def whole_number(index: CheckpointIndex, *names: str, default: int | None = None) -> int:
    """A whole number above 0 of ``config.json``.

    Args:
        index: the checkpoint.
        names: what architectures call it; the first that is there and not null counts.
        default: if none is there.

    Raises:
        CheckpointError: if it is something else, or there is none and no default.
    """
    for name in names:
        value = index.config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{index.path / 'config.json'} says that {name} is {value!r}; "
                "a whole number above 0 is needed",
                "Fetch config.json again",
            )
        return value
    if default is None:
        raise CheckpointError(
            f"{index.path / 'config.json'} does not say {' or '.join(names)}",
            "Fetch config.json again",
        )
    return default
