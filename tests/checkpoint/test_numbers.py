from pathlib import Path
from typing import Any

import pytest

from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.checkpoint.numbers import whole_number
from ggufkit.errors import CheckpointError
from tests.factory import edit_config, make_checkpoint


@pytest.mark.parametrize("value", ["two", 2.5, 0, -1, True, [2]])
def test_what_is_no_size_is_named(tmp_path: Path, value: Any) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", layers=1)
    edit_config(checkpoint, num_hidden_layers=value)
    with pytest.raises(CheckpointError, match=r"config\.json says that num_hidden_layers is"):
        whole_number(open_checkpoint(checkpoint), "num_hidden_layers", "n_layer")


def test_names_and_defaults(tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model", layers=1))
    assert whole_number(index, "n_layer", "num_hidden_layers") == 1
    assert whole_number(index, "nothing", default=7) == 7
    with pytest.raises(CheckpointError, match=r"does not say n_x or n_y"):
        whole_number(index, "n_x", "n_y")
