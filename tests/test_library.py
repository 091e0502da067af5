import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from ggufkit.errors import SourceError
from ggufkit.library import find_model, generation_config, list_models, manifest_of
from ggufkit.store import Store
from ggufkit.values import Artifact, Json

Run = Callable[..., tuple[int, str, str]]


def write_gguf(path: Path, *, tensors: bool = True, **keys: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    for key, value in keys.items():
        writer.add_string(key.replace("__", "."), value)
    if tensors:
        writer.add_tensor("a.weight", np.zeros((2, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(
    store: Store,
    type: str,
    *,
    model: str = "tiny",
    scales: str = "",
    rounding: str = "",
    imatrix: str = "",
) -> Artifact:
    """An artifact as the quantize stage makes it."""
    stem = f"{model}-awq" if scales else model

    def work(directory: Path) -> dict[str, Json]:
        write_gguf(directory / f"{stem}-{type}.gguf")
        return {"origin": "hf:org/tiny@abc"} | (
            {"rounding": {"label": rounding}} if rounding else {}
        )

    artifact = store.run(
        "quantize",
        version=1,
        model=model,
        inputs={"checkpoint": "c" * 64, "scales": scales},
        options={"recipe": {"type": type, "imatrix": imatrix}, "stem": stem},
        tool={},
        work=work,
    )
    store.link(artifact.file(".gguf"))
    return artifact


def created(artifact: Artifact, time: str) -> Artifact:
    """Say when an artifact was made: tests run within one second."""
    path = artifact.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created": time}))
    return artifact


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "models")
    created(quantize(store, "Q4_0"), "2026-01-01T00:00:00+00:00")
    created(quantize(store, "Q4_0", scales="s"), "2026-01-03T00:00:00+00:00")
    created(quantize(store, "Q8_0"), "2026-01-02T00:00:00+00:00")
    return store


def test_models_are_listed_newest_first_by_the_path_for_people(store: Store) -> None:
    listed = list_models(store)
    assert [(e.name, e.type, e.awq, e.known) for e in listed] == [
        ("tiny-awq-Q4_0", "Q4_0", True, True),
        ("tiny-Q8_0", "Q8_0", False, True),
        ("tiny-Q4_0", "Q4_0", False, True),
    ]
    assert [e.path for e in listed] == [store.root / "tiny" / f"{e.name}.gguf" for e in listed]
    assert {e.origin for e in listed} == {"hf:org/tiny@abc"}
    assert {e.bits_per_weight for e in listed} == {16.0}


def test_a_file_that_somebody_put_there_is_listed_as_such(store: Store) -> None:
    foreign = write_gguf(store.root / "sub" / "their.gguf")
    os.utime(foreign, (0, 0))
    entry = list_models(store)[-1]
    assert (entry.name, entry.path, entry.known, entry.awq) == ("their", foreign, False, None)
    assert entry.label == "no manifest"
    assert entry.created == "1970-01-01T00:00:00+00:00"


def test_the_label_says_all_ways(tmp_path: Path) -> None:
    store = Store(tmp_path)
    quantize(store, "Q4_0", scales="s", rounding="refined GPTQ", imatrix="m")
    quantize(store, "Q8_0")
    labels = {entry.label for entry in list_models(store)}
    assert labels == {"Q4_0 with AWQ and refined GPTQ and imatrix", "Q8_0"}


def test_an_exported_copy_keeps_its_manifest(store: Store) -> None:
    artifact = next(a for a in store.artifacts() if a.manifest.options["stem"] == "tiny-awq")
    out = store.export(artifact, artifact.file(".gguf"), store.root / "out")
    assert manifest_of(out) is not None
    entry = next(e for e in list_models(store) if e.path == out)
    assert (entry.type, entry.awq, entry.known) == ("Q4_0", True, True)


def test_what_is_no_model_is_not_listed(store: Store) -> None:
    before = list_models(store)
    write_gguf(store.root / "vocab.gguf", tensors=False)
    write_gguf(store.root / "x.imatrix.gguf", general__type="imatrix")
    write_gguf(store.root / "mmproj.gguf", general__type="mmproj")
    write_gguf(store.root / "tiny" / "quantize-0.partial" / "half.gguf")
    assert list_models(store) == before


def test_a_broken_file_does_not_hide_the_others(store: Store, run_cli: Run) -> None:
    broken = store.root / "tiny" / "tiny-awq-Q4_0.gguf"
    broken.write_bytes(broken.read_bytes()[:-40])
    listed = list_models(store)
    assert [bool(e.problem) for e in listed] == [True, False, False]
    assert find_model(None, store.root).name == "tiny-Q8_0.gguf"
    assert find_model("tiny-awq-Q4_0", store.root) == broken
    code, out, _ = run_cli("--models-dir", store.root, "models")
    assert code == 0
    assert "broken: " in out
    assert "is truncated" in out


def test_what_cannot_be_read_does_not_hide_the_others(store: Store) -> None:
    before = list_models(store)
    (store.root / "tiny" / "gone.gguf").symlink_to("quantize-0/gone.gguf")
    (store.root / "directory.gguf").mkdir()
    assert list_models(store) == before


def test_the_manifest_of_another_program_is_passed_over(store: Store, run_cli: Run) -> None:
    path = write_gguf(store.root / "web" / "their.gguf")
    (path.parent / "manifest.json").write_text('{"name": "a web page"}')
    assert manifest_of(path) is None
    assert "their" in [e.name for e in list_models(store) if not e.known]
    code, out, err = run_cli("inspect", path)
    assert (code, err) == (0, "")
    assert "no manifest of ggufkit" in out


def test_inspect_says_how_a_file_was_made(store: Store, run_cli: Run) -> None:
    code, out, _ = run_cli("--models-dir", store.root, "inspect", "tiny-awq-q4_0")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert any(row.startswith("made by ggufkit quantize ") for row in rows)
    assert "from checkpoint cccccccccccc, scales s" in rows
    assert "origin hf:org/tiny@abc" in rows


def test_of_two_with_one_name_the_newer_is_meant(store: Store) -> None:
    newer = quantize(store, "Q4_0", scales="other")
    names = [e.name for e in list_models(store)]
    assert names.count("tiny-awq-Q4_0") == 2
    assert find_model("tiny-awq-q4_0", store.root).resolve() == newer.file(".gguf").resolve()


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (None, "tiny-awq-Q4_0"),
        ("tiny-q8_0", "tiny-Q8_0"),
        ("TINY-Q8", "tiny-Q8_0"),
        ("tiny-a", "tiny-awq-Q4_0"),
    ],
)
def test_models_are_found_by_name(store: Store, spec: str | None, found: str) -> None:
    assert find_model(spec, store.root).stem == found


def test_a_path_is_taken_as_it_is(store: Store, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "else.gguf")
    assert find_model(str(path), store.root) == path


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("none", "is called 'none'", "There are: tiny-awq-Q4_0, tiny-Q8_0, tiny-Q4_0"),
        ("tiny", "'tiny' fits several models", "Which of: tiny-awq-Q4_0, tiny-Q8_0, tiny-Q4_0"),
        ("none.gguf", "there is no none.gguf", "ggufkit models"),
    ],
)
def test_a_name_that_fits_none_or_many(store: Store, spec: str, message: str, hint: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        find_model(spec, store.root)
    assert hint in caught.value.hint


def test_an_empty_models_directory_says_how_to_begin(tmp_path: Path) -> None:
    assert list_models(Store(tmp_path / "none")) == ()
    with pytest.raises(SourceError, match="there is no model in") as caught:
        find_model(None, tmp_path / "none")
    assert "ggufkit convert" in caught.value.hint


def test_the_generation_config_is_that_of_the_checkpoint(store: Store) -> None:
    file = store.root / "tiny" / "tiny-Q8_0.gguf"
    assert generation_config(store, file) is None

    def work(directory: Path) -> dict[str, Json]:
        (directory / "generation_config.json").write_text("{}")
        return {}

    nothing: dict[str, Json] = {}
    fetched = store.run(
        "fetch", version=1, model="tiny", inputs=nothing, options=nothing, tool=nothing, work=work
    )
    assert generation_config(store, file) == fetched.path / "generation_config.json"


def test_the_command_line_lists_them(store: Store, run_cli: Run) -> None:
    code, out, err = run_cli("--models-dir", store.root, "models")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "tiny-awq-Q4_0"
    assert "Q4_0 with AWQ, 16.00 bits per weight" in out
    assert "from hf:org/tiny@abc" in out
    code, out, _ = run_cli("--models-dir", store.root, "models", "--json")
    assert [e["name"] for e in json.loads(out)] == ["tiny-awq-Q4_0", "tiny-Q8_0", "tiny-Q4_0"]
