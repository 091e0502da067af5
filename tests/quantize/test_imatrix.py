"""Importance matrices read as llama-quantize reads them, and held against a model."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from ggufkit.errors import GgufkitError, IntegrityError, UsageError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.output import QuantizeOutput
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.quantize.coverage import (
    coverage_notes,
    coverage_of,
    require_same_model,
)
from ggufkit.quantize.imatrix import ImatrixEntry, read_imatrix, write_imatrix
from ggufkit.quantize.types import NEED_IMATRIX, TYPES, require_importance
from tests.factory import make_checkpoint

Run = Callable[..., tuple[int, str, str]]
Entries = Mapping[str, list[tuple[np.ndarray, int]]]


def write_older(path: Path, entries: Entries) -> None:
    """The format before GGUF, as llama-imatrix --output-format dat writes it."""
    parts = [struct.pack("<i", len(entries))]
    for name, matrices in entries.items():
        values = np.concatenate([mean for mean, _ in matrices]).astype("<f4").tobytes()
        spelled = name.encode()
        parts += [struct.pack("<i", len(spelled)), spelled, struct.pack("<ii", 1, len(values) // 4)]
        parts.append(values)
    path.write_bytes(b"".join(parts))


def write(path: Path, entries: Entries) -> Path:
    if path.suffix == ".dat":
        write_older(path, entries)
    else:
        write_imatrix(path, entries, dataset="x", chunk_tokens=10, chunks=1)
    return path


@pytest.fixture(scope="module")
def dense(tiny_types: dict[str, Path]) -> Path:
    """A Llama of two blocks, F32, 256 wide."""
    return tiny_types["F32"]


@pytest.fixture(scope="module")
def mixture(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of two blocks and four experts, F32."""
    place = tmp_path_factory.mktemp("mixture")
    out = place / "mixture-F32.gguf"
    toolchain.convert_checkpoint(
        native,
        make_checkpoint(place / "checkpoint", "mixtral"),
        out,
        outtype="f32",
        name="mixture",
        log=place / "log",
    )
    return out


def entries_of(gguf: Path, tokens: int = 10) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Entries as llama-imatrix would have them for a model, all of them ones."""
    return {
        t.name: [(np.ones(t.shape[0], np.float32), tokens)] * (t.shape[2] if t.shape[2:] else 1)
        for t in read_gguf(gguf, arrays=False).tensors
        if len(t.shape) > 1 and t.name.startswith("blk.") and "gate_inp" not in t.name
    }


def plan(native: NativeBuild, gguf: Path, scratch: Path, **options: object) -> QuantizeOutput:
    return toolchain.quantize(  # type: ignore[misc]
        native, gguf, scratch / "out.gguf", "Q4_K_S", threads=1, log=scratch / "log", **options
    )


# Reading.


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_what_llama_imatrix_writes(
    native: NativeBuild, dense: Path, tmp_path: Path, suffix: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words of a text to make a matrix of. " * 200)
    out = tmp_path / f"imatrix{suffix}"
    argv = [native.tool("llama-imatrix"), "-m", dense, "-f", text, "-o", out, "-c", "64"]
    kind = suffix.removeprefix(".")
    ran = toolchain.run([*argv, "--output-format", kind, "--chunks", "2", "-t", "1"])
    assert ran.returncode == 0, ran.tail
    entries = read_imatrix(out)
    counts = (128.0,) if suffix == ".gguf" else None
    assert entries == {
        name: ImatrixEntry(len(matrices[0][0]), counts)
        for name, matrices in entries_of(dense).items()
    }
    planned = plan(native, dense, tmp_path, imatrix=out, dry_run=True)
    coverage = coverage_of(entries, planned.tensors)
    require_same_model(out, entries, planned.tensors, coverage)
    assert coverage.facts["covered"] == coverage.tensors == 14
    assert coverage_notes({"imatrix": coverage.facts}) == ()


def test_older_files_are_read_and_used(native: NativeBuild, dense: Path, tmp_path: Path) -> None:
    """What we take for the older format, llama-quantize does too."""
    imatrix = write(tmp_path / "older.dat", entries_of(dense))
    assert {e.values for e in read_imatrix(imatrix).values()} == {256, 512}
    done = plan(native, dense, tmp_path, imatrix=imatrix)
    assert done.without_importance == ("token_embd.weight",)


def broken(place: Path) -> dict[str, Path]:
    """Files that are no importance matrices, by what is wrong with them."""
    good = {"blk.0.attn_q.weight": [(np.ones(8, np.float32), 10)]}
    (place / "empty.dat").write_bytes(b"")
    (place / "words.dat").write_bytes(b"these are words, and no numbers at all")
    (place / "zero.dat").write_bytes(struct.pack("<i", 0))
    for kind in ("dat", "gguf"):
        whole = write(place / f"whole.{kind}", good)
        (place / f"cut.{kind}").write_bytes(whole.read_bytes()[:-30])
        whole.unlink()
        write(place / f"nan.{kind}", {"a": [(np.full(8, np.nan, np.float32), 10)]})
    for name, keys, counts in (("keys", False, True), ("counts", True, False)):
        writer = GGUFWriter(place / f"{name}.gguf", arch="")
        if keys:
            writer.add_array("imatrix.datasets", ["x"])
            writer.add_uint32("imatrix.chunk_count", 1)
            writer.add_uint32("imatrix.chunk_size", 1)
        writer.add_tensor("a.in_sum2", np.ones((1, 8), np.float32))
        if counts:
            writer.add_tensor("a.counts", np.ones((1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {path.name: path for path in place.iterdir()}


WRONG = {
    "empty.dat": "older format, or it is truncated",
    "words.dat": "older format, or it is truncated",
    "zero.dat": "has no entries",
    "cut.dat": "older format, or it is truncated",
    "cut.gguf": "is truncated",
    "nan.gguf": "holds NaN or infinity for a",
    "nan.dat": "holds NaN or infinity for a",
    "keys.gguf": "lacks the key imatrix.datasets",
    "counts.gguf": "a has no counts",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_importance_matrix(
    native: NativeBuild, dense: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "files").mkdir()
    path = broken(tmp_path / "files")[name]
    with pytest.raises(IntegrityError, match=WRONG[name]):
        read_imatrix(path)
    with pytest.raises(GgufkitError):  # llama-quantize refuses it too
        plan(native, dense, tmp_path, imatrix=path)


def test_a_model_and_nothing_are_no_importance_matrix(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"it is a model \(llama\)"):
        read_imatrix(dense)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match="There is no importance matrix"):
            read_imatrix(path)


# Coverage.


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_coverage_is_what_llama_quantize_remarks(
    native: NativeBuild, dense: Path, tmp_path: Path, suffix: str
) -> None:
    lacking = ("blk.0.attn_q.weight", "blk.1.ffn_up.weight", "blk.1.attn_k.weight")
    kept = {name: e for name, e in entries_of(dense).items() if name not in lacking}
    kept["blk.7.attn_q.weight"] = kept["blk.1.attn_q.weight"]
    imatrix = write(tmp_path / f"partial{suffix}", kept)
    entries = read_imatrix(imatrix)
    planned = plan(native, dense, tmp_path, imatrix=imatrix, dry_run=True)
    coverage = coverage_of(entries, planned.tensors)
    require_same_model(imatrix, entries, planned.tensors, coverage)
    done = plan(native, dense, tmp_path, imatrix=imatrix)
    assert set(done.without_importance) == {*coverage.without, "token_embd.weight"}
    assert sorted(coverage.without) == sorted(lacking)
    assert (coverage.tensors, coverage.foreign) == (14, ("blk.7.attn_q.weight",))
    notes = coverage_notes({"imatrix": coverage.facts})
    assert notes[0] == (
        "the importance matrix has entries for 11 of 14 tensors; 3 are rounded as without one, "
        f"such as {coverage.without[0]}"
    )
    assert "1 entries for tensors that this model lacks, such as blk.7.attn_q" in notes[1]


def test_experts_that_no_token_came_to(native: NativeBuild, mixture: Path, tmp_path: Path) -> None:
    kept = entries_of(mixture)
    for name in ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps"):
        matrices = list(kept[f"blk.1.{name}.weight"])
        matrices[2] = (np.zeros_like(matrices[2][0]), 0)
        kept[f"blk.1.{name}.weight"] = matrices
    kept["blk.0.attn_q.weight"] = [(np.zeros(256, np.float32), 0)]
    imatrix = write(tmp_path / "imatrix.gguf", kept)
    planned = plan(native, mixture, tmp_path, imatrix=imatrix)
    coverage = coverage_of(read_imatrix(imatrix), planned.tensors)
    assert (coverage.experts, coverage.unused) == (8, ("expert 2 of blk.1",))
    assert coverage.without == ("blk.0.attn_q.weight",)
    assert any(
        "never came to 1 of 8 experts" in note and "such as expert 2 of blk.1" in note
        for note in coverage_notes({"imatrix": coverage.facts})
    )


def other(entries: dict[str, list[tuple[np.ndarray, int]]], how: str) -> Entries:
    """Entries of another model."""
    if how == "names":
        return {f"model.{name}": matrices for name, matrices in entries.items()}
    if how == "width":
        return {name: [(mean[:-32], n) for mean, n in e] for name, e in entries.items()}
    if how == "few":
        return {name: e for name, e in entries.items() if name.startswith("blk.0.attn_")}
    assert how == "deeper"
    return {name.replace("blk.1.", "blk.11."): e for name, e in entries.items()}


OTHERS = {
    "names": ("no entry for any of the 14 tensors", "not named as tensors of a GGUF"),
    "width": ("has 224 values, the tensor 256 inputs", "is of 224 inputs, and no tensor"),
    "few": ("for 4 of the 14 tensors", "for 4 of the 14 tensors"),
    "deeper": ("", "an entry for blk.11.attn_"),
}
"""What is said of a GGUF, and of a checkpoint that is not converted yet."""


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
@pytest.mark.parametrize("how", OTHERS)
def test_a_matrix_of_another_model_is_refused(
    run_cli: Run, dense: Path, tmp_path: Path, how: str, suffix: str
) -> None:
    imatrix = write(tmp_path / f"other{suffix}", other(entries_of(dense), how))
    told = run_cli(
        *("--models-dir", tmp_path / "models", "quantize", dense),
        *("--type", "q4_k_s", "--imatrix", imatrix),
    )
    if OTHERS[how][0]:
        assert told[:2] == (1, "")
        assert f"other{suffix} is not of this model" in told[2]
        assert OTHERS[how][0] in told[2]
        assert "hint: " in told[2]
        assert not list(tmp_path.glob("models/**/*.gguf"))
    else:  # half of the entries are for it
        assert told[0] == 0
        assert "7 entries for tensors that this model lacks" in told[2]


@pytest.mark.parametrize("how", OTHERS)
def test_it_is_refused_before_the_conversion(
    run_cli: Run, dense: Path, tmp_path: Path, how: str
) -> None:
    imatrix = write(tmp_path / "other.gguf", other(entries_of(dense), how))
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    told = run_cli(
        *("--models-dir", tmp_path / "models", "convert", checkpoint, "--no-verify"),
        *("--type", "q4_k_s", "--imatrix", imatrix),
    )
    assert told[:2] == (1, "")
    assert OTHERS[how][1] in told[2]
    assert ("converting" in told[2]) == (how == "few")


def test_partial_coverage_is_told_and_kept(run_cli: Run, dense: Path, tmp_path: Path) -> None:
    kept = entries_of(dense)
    del kept["blk.1.ffn_up.weight"]
    imatrix = write(tmp_path / "partial.gguf", kept)
    args = ("--models-dir", tmp_path / "models", "quantize", dense, "--imatrix", imatrix)
    note = "entries for 13 of 14 tensors; 1 are rounded as without one, such as blk.1.ffn_up.weight"
    code, _, err = run_cli(*args, "--type", "q4_k_s")
    assert code == 0
    assert f"warning: the importance matrix has {note}" in err
    code, out, err = run_cli(*args, "--type", "q4_k_s", "--json")  # there already
    assert code == 0
    assert note in out
    (manifest,) = (tmp_path / "models").glob("**/quantize-*/manifest.json")
    assert '"covered": 13' in manifest.read_text()


# Types.


def test_types_that_need_one_are_those_that_llama_quantize_refuses(
    native: NativeBuild, dense: Path, tmp_path: Path
) -> None:
    refused = {}
    for type in TYPES:
        try:
            toolchain.quantize(
                native, dense, tmp_path / "out.gguf", type, threads=1, log=tmp_path / "log"
            )
        except GgufkitError as error:
            refused[type] = error.message
    assert all("needs an importance matrix" in message for message in refused.values())
    assert refused == set(NEED_IMATRIX)


def test_a_type_that_needs_one_is_refused_before_work(
    run_cli: Run, dense: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    for verb, source in (("convert", checkpoint), ("quantize", dense)):
        told = run_cli(
            *("--models-dir", tmp_path / "models", verb, source),
            *("--type", "q8_0", "--type", "iq2_xs"),
        )
        assert told[:2] == (1, "")
        assert "error: IQ2_XS needs an importance matrix" in told[2]
        assert "converting" not in told[2]
        assert "quantizing" not in told[2]
        assert not list(tmp_path.glob("models/**/*.gguf"))


def test_rows_that_fall_back_need_none() -> None:
    require_importance("IQ1_S", [576, 1536 + 32])
    require_importance("Q4_K_M", [256])
    with pytest.raises(GgufkitError, match="IQ1_S needs an importance matrix"):
        require_importance("IQ1_S", [576, 1536])


def test_experts_alone_become_mxfp4(
    run_cli: Run, dense: Path, mixture: Path, tmp_path: Path
) -> None:
    told = {}
    for gguf in (dense, mixture):
        code, _, err = run_cli(
            "--models-dir", tmp_path / "models", "quantize", gguf, "--type", "mxfp4_moe"
        )
        assert code == 0
        told[gguf] = "puts the maps of experts alone into MXFP4" in err
        if gguf == dense:
            assert "all that is quantized became Q8_0, and the file has 8.5" in err
    assert told == {dense: True, mixture: False}
