from typing import Any

import pytest

from ggufkit.checkpoint.config import required_size
from ggufkit.errors import CheckpointError


@pytest.mark.parametrize("value", ["two", 2.5, 0, -1, True, [2]])
def test_what_is_no_size_is_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"num_hidden_layers.* of config\.json is"):
        required_size({"num_hidden_layers": value}, "num_hidden_layers", "n_layer")


def test_names_and_defaults() -> None:
    config = {"num_hidden_layers": 1, "n_x": None}
    assert required_size(config, "n_layer", "num_hidden_layers") == 1
    assert required_size(config, "nothing", default=7) == 7
    with pytest.raises(CheckpointError, match=r"does not say n_x or n_y"):
        required_size(config, "n_x", "n_y")
