"""What a checkpoint's ``config.json`` says about its text model."""

from collections.abc import Mapping
from typing import Any

from ggufkit.errors import CheckpointError
from ggufkit.values import Json

TEXT_PARTS = ("text_config", "llm_config", "lm_config", "language_config")
"""Keys of the part about text, in the config of a model with several parts."""


def text_config(config: Mapping[str, Json]) -> dict[str, Any]:
    """A config with the part about text moved up to its top.

    Raises:
        CheckpointError: that part is not an object.
    """
    flat = dict(config)
    for name in TEXT_PARTS:
        part = config.get(name)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise CheckpointError(f"{name} of config.json is not an object", "Fetch it again")
        flat |= part
    return flat


def whole_number(config: Mapping[str, Json], *keys: str) -> int | None:
    """The first of some keys that the config has; None if it has none.

    Raises:
        CheckpointError: the value is no natural number.
    """
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(
                f"{key} of config.json is {value!r}, which is not a natural number",
                "Fetch config.json again, or correct it",
            )
        return value
    return None


def token_ids(source: str, key: str, value: Json) -> list[int]:
    """Ids of tokens: none, one or a list.

    Args:
        source: file that the value is from.
        key: key that it has there.
        value: the value.

    Raises:
        CheckpointError: the value is something else.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int):
            raise CheckpointError(
                f"{key} of {source} is {value!r}; it must be a token's id or a list of ids",
                f"Correct {source}",
            )
    return values
