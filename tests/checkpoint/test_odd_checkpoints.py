"""Checkpoints with one to three oddities: mended, or refused by name; never a traceback."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ggufkit.checkpoint import open_checkpoint
from ggufkit.checkpoint.prepare import Prepared, prepare_checkpoint
from ggufkit.errors import GgufkitError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.factory import make_checkpoint

Mutation = Callable[[Path, random.Random], None]
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
ODD_VALUES: tuple[Any, ...] = (None, 0, -1, 3, 2.5, True, "x", [], [1], ["x"], {}, {"id": 1})


def edit(path: Path, **changes: Any) -> None:
    try:
        content = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        return  # broken by another mutation
    if isinstance(content, dict):
        path.write_text(json.dumps(content | changes))


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def change_tensors(
    path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    file = path / "model.safetensors"
    if file.exists():
        save_file(
            {n: t.clone() for n, t in change(load_file(file)).items()}, file, {"format": "pt"}
        )


def stale_index(path: Path, pick: random.Random) -> None:
    names = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    edit(path / "model.safetensors.index.json", weight_map=names)


def index_of_this_file(path: Path, pick: random.Random) -> None:
    file = path / "model.safetensors"
    names = dict.fromkeys(load_file(file), file.name) if file.exists() else {}
    edit(path / "model.safetensors.index.json", weight_map=names)


def odd_index(path: Path, pick: random.Random) -> None:
    edit(path / "model.safetensors.index.json", weight_map=pick.choice(ODD_VALUES))


def no_weights(path: Path, pick: random.Random) -> None:
    (path / "model.safetensors").unlink(missing_ok=True)


def further_tokens(path: Path, pick: random.Random) -> None:
    first = pick.choice([380, 384, 390, 500])
    rows = [
        {"id": first + n, "content": pick.choice(["<new>", "<pad>", "</s>", ""]), "special": True}
        for n in range(pick.choice([1, 3, 20]))
    ]
    tokenizer = read(path / "tokenizer.json")
    had = tokenizer.get("added_tokens")
    edit(path / "tokenizer.json", added_tokens=[*(had if isinstance(had, list) else []), *rows])


def older_added_tokens(path: Path, pick: random.Random) -> None:
    edit(path / "added_tokens.json", **{"<old>": pick.choice([383, 384, "x", None, 9999])})


def odd_added_tokens(path: Path, pick: random.Random) -> None:
    edit(path / "tokenizer.json", added_tokens=pick.choice(ODD_VALUES))


def odd_decoder(path: Path, pick: random.Random) -> None:
    edit(path / "tokenizer_config.json", added_tokens_decoder=pick.choice(ODD_VALUES))


def odd_vocabulary(path: Path, pick: random.Random) -> None:
    model = read(path / "tokenizer.json").get("model")
    if isinstance(model, dict):
        edit(path / "tokenizer.json", model=model | {"vocab": pick.choice(ODD_VALUES)})


def odd_template(path: Path, pick: random.Random) -> None:
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use"}]
    value = pick.choice([*ODD_VALUES, named, "{{ messages }}"])
    edit(path / "tokenizer_config.json", chat_template=value)


def template_file(path: Path, pick: random.Random) -> None:
    (path / "chat_template.jinja").write_bytes(pick.choice([b"{{ messages }}", b"", b"\xff\xfe"]))


def template_of_a_processor(path: Path, pick: random.Random) -> None:
    edit(path / "chat_template.json", chat_template=pick.choice([*ODD_VALUES, "{{ messages }}"]))


def end_tokens(path: Path, pick: random.Random) -> None:
    file = pick.choice(["config.json", "generation_config.json"])
    value = pick.choice([*ODD_VALUES, [2, 3, 4, 5], [2, 99999], [None]])
    edit(path / file, eos_token_id=value)


def left_section(path: Path, pick: random.Random) -> None:
    key = pick.choice(["quantization_config", "compression_config"])
    edit(path / "config.json", **{key: pick.choice([*ODD_VALUES, {"quant_method": "gptq"}])})


def packed(path: Path, pick: random.Random) -> None:
    change_tensors(path, lambda t: t | {"model.layers.0.x.qweight": torch.zeros(2, 2)})


def without_prefix(path: Path, pick: random.Random) -> None:
    change_tensors(path, lambda t: {n.removeprefix("model."): v for n, v in t.items()})


def missing_tensor(path: Path, pick: random.Random) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gone = pick.choice(sorted(tensors)) if tensors else ""
        return {n: t for n, t in tensors.items() if n != gone}

    change_tensors(path, drop)


def other_shape(path: Path, pick: random.Random) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = pick.choice(sorted(tensors)) if tensors else ""
        change = pick.choice([torch.flatten, lambda t: torch.cat([t, t]), lambda t: t[:0]])
        return tensors | ({name: change(tensors[name])} if name else {})

    change_tensors(path, turn)


def further_layer(path: Path, pick: random.Random) -> None:
    change_tensors(
        path,
        lambda t: t | {n.replace("layers.1.", "layers.2."): v for n, v in t.items()},
    )


def output_matrix(path: Path, pick: random.Random) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = tensors.get("model.embed_tokens.weight", torch.zeros(4, 4))
        other = pick.choice([embedding, embedding + 1, embedding.bfloat16(), embedding[:-1]])
        return tensors | {"lm_head.weight": other}

    change_tensors(path, store)


def other_key(path: Path, pick: random.Random) -> None:
    keys = sorted(read(path / "config.json")) or ["vocab_size"]
    edit(path / "config.json", **{pick.choice(keys): pick.choice(ODD_VALUES)})


def other_size(path: Path, pick: random.Random) -> None:
    key = pick.choice(["vocab_size", "num_hidden_layers", "hidden_size", "num_key_value_heads"])
    edit(path / "config.json", **{key: pick.choice([1, 2, 3, 4, 64, 400])})


def odd_part(path: Path, pick: random.Random) -> None:
    edit(path / "config.json", text_config=pick.choice([*ODD_VALUES, {"vocab_size": "x"}]))


def further_prediction(path: Path, pick: random.Random) -> None:
    edit(path / "config.json", num_nextn_predict_layers=pick.choice(ODD_VALUES))


def adapter_config(path: Path, pick: random.Random) -> None:
    (path / "adapter_config.json").write_text(json.dumps(pick.choice(ODD_VALUES)))


def broken_json(path: Path, pick: random.Random) -> None:
    text = pick.choice([b"", b"{", b"[1]", b"null", b'"x"', b"\xff", b"[" * 5000, b"{}"])
    (path / pick.choice(JSON_FILES)).write_bytes(text)


def missing_file(path: Path, pick: random.Random) -> None:
    (path / pick.choice([*JSON_FILES, "tokenizer.model"])).unlink(missing_ok=True)


def odd_model_file(path: Path, pick: random.Random) -> None:
    content = pick.choice([b"", b"\n", b"\nrubbish", b"YQ== 0\n"])
    (path / "tokenizer.model").write_bytes(content)


MUTATIONS: dict[str, Mutation] = {
    f.__name__: f
    for f in (
        *(stale_index, index_of_this_file, odd_index, no_weights, further_tokens),
        *(older_added_tokens, odd_added_tokens, odd_decoder, odd_vocabulary, odd_template),
        *(template_file, template_of_a_processor, end_tokens, left_section, packed),
        *(without_prefix, missing_tensor, other_shape, further_layer, output_matrix, other_key),
        *(other_size, odd_part, further_prediction, adapter_config, broken_json, missing_file),
        odd_model_file,
    )
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("sound") / "tiny", hidden=64, intermediate=64, vocab=384
    )


def prepared_or_refused(
    sound: Path, place: Path, names: list[str], number: int
) -> Prepared | GgufkitError:
    shutil.copytree(sound, odd := place / "odd")
    pick = random.Random(number)
    for name in names:
        MUTATIONS[name](odd, pick)
    try:
        return prepare_checkpoint(open_checkpoint(odd), place / "prepared")
    except GgufkitError as error:
        return error


_SOME = st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=1, max_size=3)


@seed(12)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(["broken_json", "missing_file"], 3)
@given(_SOME, st.integers(0, 10_000))
def test_opened_and_prepared_or_refused(sound: Path, names: list[str], number: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        found = prepared_or_refused(sound, Path(place), names, number)
        if isinstance(found, Prepared):
            # What was mended once is in order.
            again = prepare_checkpoint(open_checkpoint(found.path), Path(place) / "again")
            assert again.index.tensors == found.index.tensors
            assert again.end_tokens == found.end_tokens
        else:
            assert found.message


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_oddity_alone(sound: Path, tmp_path: Path, name: str) -> None:
    for number in range(8):
        (place := tmp_path / str(number)).mkdir()
        prepared_or_refused(sound, place, [name], number)


_LOAD = """
import sys
from pathlib import Path
from ggufkit.llamacpp.batching import Model
for path in sys.argv[1:]:
    Model(Path(path)).close()
    print(path, flush=True)
"""
WHOLE_WAY = (
    *("stale_index", "further_tokens", "odd_template", "template_file", "end_tokens"),
    *("left_section", "without_prefix", "output_matrix", "older_added_tokens", "missing_tensor"),
    *("other_shape", "further_prediction"),
)


def test_what_converts_can_be_loaded(native: NativeBuild, sound: Path, tmp_path: Path) -> None:
    made = []
    for number, name in enumerate(WHOLE_WAY):
        (place := tmp_path / name).mkdir()
        found = prepared_or_refused(sound, place, [name], number)
        if isinstance(found, GgufkitError):
            continue
        out = place / "odd.gguf"
        try:
            toolchain.convert_checkpoint(
                native,
                found.path,
                out,
                outtype="f32",
                name="odd",
                options=found.converter_options,
                log=place / "log",
            )
        except GgufkitError:
            continue
        made.append(str(out))
    assert len(made) >= len(WHOLE_WAY) // 2
    done = subprocess.run([sys.executable, "-c", _LOAD, *made], capture_output=True, text=True)
    assert done.stdout.split() == made, done.stderr[-2000:]
