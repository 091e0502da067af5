"""Checkpoints that a library stumbles over: an error with the next step, and no traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.errors import CheckpointError
from ggufkit.scaling.calibration import read_documents
from ggufkit.scaling.families import family_of
from ggufkit.scaling.streaming import streamed_model
from tests.factory import break_truncated, edit_config, make_checkpoint


def write_tokenizer_json(text: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / "tokenizer.json").write_text(text)

    return damage


def change_config(**changes: object) -> Callable[[Path], None]:
    return lambda checkpoint: edit_config(checkpoint, **changes)


def cut_rows(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][:7].clone()}, path, metadata={"format": "pt"})


SMALL = ("--calibration-samples", 2, "--calibration-length", 32)
VERBS = {
    "awq": ("awq", "-o"),
    "convert --awq": ("convert", "--no-verify", "--awq"),
    "convert --imatrix auto": ("convert", "--no-verify", "--imatrix", "auto"),
    "convert --rounding gptq": ("convert", "--no-verify", "--rounding", "gptq"),
}
DAMAGES = {
    "tokenizer.json": ("awq", write_tokenizer_json("{broken"), 1, "tokenizer"),
    "model_type": ("convert --awq", change_config(model_type="nobody"), 1, "`nobody`"),
    "field": (
        "convert --imatrix auto",
        change_config(num_hidden_layers="two"),
        1,
        "num_hidden_layers",
    ),
    "shard": ("convert --rounding gptq", break_truncated, 3, "model.safetensors is truncated"),
    "activation": ("convert --awq", change_config(hidden_act="strange"), 1, "'strange'"),
}
"""What is broken: the command, how it is broken, the exit code, what must be said."""


@pytest.mark.parametrize("name", DAMAGES)
def test_the_command_line_ends_with_an_error(native: object, tmp_path: Path, name: str) -> None:
    verb, damage, code, message = DAMAGES[name]
    checkpoint = make_checkpoint(tmp_path / "broken", layers=1)
    damage(checkpoint)
    words = [*VERBS[verb], *([tmp_path / "out"] if verb == "awq" else []), checkpoint]
    command = ["--models-dir", tmp_path / "models", *words, "--type", "q4_0", *SMALL]
    # In a process of its own: libraries log to the stderr that they found first.
    ran = subprocess.run(
        [sys.executable, "-m", "ggufkit", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (code, "")
    assert "Traceback" not in ran.stderr
    error = next(line for line in ran.stderr.splitlines() if line.startswith("error: "))
    assert message in error
    assert "hint: " in ran.stderr
    assert not list(tmp_path.glob("models/*/*.gguf"))


MODELS = {
    "model_type": ("llama", change_config(model_type="nobody"), "transformers cannot read"),
    "no class": (
        "internlm2",
        change_config(auto_map=None, model_type="internlm2"),
        "transformers cannot read",
    ),
    "heads": ("llama", change_config(num_attention_heads=0), "transformers cannot"),
    "rope": (
        "llama",
        change_config(rope_scaling={"rope_type": "strange", "factor": 2.0}),
        "transformers cannot make the model of .*config.json: KeyError: 'strange'",
    ),
    "rows": ("llama", cut_rows, r"q_proj.weight of broken is 7 x 256, and .* 256 x 256"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_transformers_cannot_run(tmp_path: Path, name: str) -> None:
    import torch

    arch, damage, message = MODELS[name]
    checkpoint = make_checkpoint(tmp_path / "broken", arch, layers=1)
    damage(checkpoint)
    index = open_checkpoint(checkpoint)
    with (
        pytest.raises(CheckpointError, match=message) as caught,
        streamed_model(index, family_of(index.config), tmp_path) as model,
    ):
        model.run(torch.ones(1, 4, dtype=torch.int64), lambda block, hidden: block.forward(hidden))
    assert "fetch" in caught.value.hint.lower()


def test_mistakes_of_ours_while_a_model_runs_keep_their_traceback(tmp_path: Path) -> None:
    import torch

    index = open_checkpoint(make_checkpoint(tmp_path / "model", layers=1))

    class OursError(Exception):
        __module__ = "ggufkit.scaling.search"

    def each(*_: object) -> torch.Tensor:
        raise OursError

    with (
        pytest.raises(OursError),
        streamed_model(index, family_of(index.config), tmp_path) as model,
    ):
        model.run(torch.ones(1, 4, dtype=torch.int64), each)


@pytest.mark.parametrize(
    "text",
    [
        "{broken",
        json.dumps(
            {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x"]}}
        ),
        "[]",
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path, text: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "broken", layers=1)
    write_tokenizer_json(text)(checkpoint)
    rows = tmp_path / "chats.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with pytest.raises(
        CheckpointError, match="transformers cannot load the tokenizer of"
    ) as caught:
        read_documents(rows, open_checkpoint(checkpoint))
    assert "tokenizer.json" in caught.value.hint
