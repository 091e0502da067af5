import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit.ollama import parse

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path, demo_gguf: Path) -> Path:
    path = tmp_path / "models" / "demo.gguf"
    path.parent.mkdir()
    path.symlink_to(demo_gguf.resolve())
    return path


def test_it_is_written_beside_the_model(run_cli: Run, model: Path) -> None:
    code, out, err = run_cli("modelfile", model)
    written = model.parent / "Modelfile"
    assert (code, out, err) == (0, f"{written}\n", "")
    made = parse(written.read_text())
    assert made.from_ == "./demo.gguf"
    assert ("stop", "<|im_end|>") in made.parameters
    assert run_cli("modelfile", model) == (0, out, "")


def test_options_reach_it(run_cli: Run, model: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "other" / "M"
    code, out, _ = run_cli(
        "modelfile", model, "-o", out_file, "-sys", 'Say "hi".\nTwice.', "--num-ctx", 512
    )
    assert (code, out) == (0, f"{out_file}\n")
    made = parse(out_file.read_text())
    assert made.from_ == "../models/demo.gguf"
    assert made.system == 'Say "hi".\nTwice.'
    assert dict(made.parameters)["num_ctx"] == "512"


def test_another_file_is_not_replaced_unless_asked(run_cli: Run, model: Path) -> None:
    mine = model.parent / "Modelfile"
    mine.write_text("FROM mine\n")
    code, out, err = run_cli("modelfile", model)
    assert (code, out) == (2, "")
    assert "exists and says something else" in err
    assert "hint: Replace it with --force" in err
    assert mine.read_text() == "FROM mine\n"
    assert run_cli("modelfile", model, "--force")[0] == 0
    assert parse(mine.read_text()).from_ == "./demo.gguf"


def test_it_goes_to_stdout(run_cli: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    code, out, _ = run_cli("modelfile", model, "-o", "-")
    assert code == 0
    assert parse(out).from_ == "./models/demo.gguf"
    assert [p.name for p in model.parent.iterdir()] == ["demo.gguf"]


def test_as_json(run_cli: Run, model: Path) -> None:
    code, out, _ = run_cli("modelfile", model, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["path"] == str(model.parent / "Modelfile")
    assert told["from_"] == "./demo.gguf"


def test_sampling_comes_out_of_the_checkpoints_own_file(run_cli: Run, model: Path) -> None:
    config = {"temperature": 0.25, "top_k": 9, "do_sample": True}
    (model.parent / "generation_config.json").write_text(json.dumps(config))
    code, out, _ = run_cli("modelfile", model, "-o", "-")
    assert code == 0
    told = dict(parse(out).parameters)
    assert (told["temperature"], told["top_k"]) == ("0.25", "9")
    assert "top_p" not in told


def test_a_broken_generation_config_is_named(run_cli: Run, model: Path) -> None:
    (model.parent / "generation_config.json").write_text("{")
    code, _, err = run_cli("modelfile", model)
    assert code == 3
    assert "generation_config.json is not JSON" in err
    (model.parent / "generation_config.json").write_text("[]")
    code, _, err = run_cli("modelfile", model)
    assert code == 3
    assert "generation_config.json does not hold a JSON object" in err
    assert not (model.parent / "Modelfile").exists()


def test_another_file_in_utf_16_is_not_replaced(run_cli: Run, model: Path) -> None:
    kept = "FROM x\n".encode("utf-16")
    (model.parent / "Modelfile").write_bytes(kept)
    code, _, err = run_cli("modelfile", model)
    assert code == 2
    assert "says something else" in err
    assert (model.parent / "Modelfile").read_bytes() == kept


def test_without_a_model_it_takes_the_newest_and_says_so(run_cli: Run, model: Path) -> None:
    code, out, err = run_cli("--models-dir", model.parent, "modelfile")
    assert (code, out) == (0, f"{model.parent / 'Modelfile'}\n")
    assert f"for the newest model: {model}" in err


def test_a_file_that_is_no_gguf(run_cli: Run, tmp_path: Path, demo_gguf: Path) -> None:
    broken = tmp_path / "broken.gguf"
    with demo_gguf.open("rb") as source, broken.open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(5_000_000)
    code, out, err = run_cli("modelfile", broken)
    assert (code, out) == (3, "")
    assert "is truncated" in err
    assert not (tmp_path / "Modelfile").exists()
