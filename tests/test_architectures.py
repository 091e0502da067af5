"""Recipes of all kinds of ``tests.architectures``; ``make test-architectures`` tries every one."""

import ast
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from ggufkit.llamacpp.toolchain import NativeBuild
from tests import factory
from tests.architectures import vocabularies
from tests.architectures.making import make
from tests.architectures.recipes import RECIPES
from tests.architectures.recipes.shared import VOCAB
from tests.architectures.row import OK, Kind, Row, Verdict, differs, resolved
from tests.architectures.running import EndedError, isolated

CHOSEN = {
    "llama31": "tied, byte-level BPE, scaled RoPE",
    "llama_bias": "not tied, SentencePiece, biases",
    "gemma3": "windows, q/k norms, norms before and after, RoPE of two bases",
    "olmo2": "norms after alone",
    "gpt2": "layer norms with biases, fused and turned maps, learned positions",
    "mistral_swa": "a window that llama.cpp does not compute",
    "qwen3_moe": "experts",
    "qwen2_moe": "experts and shared ones",
    "deepseek_v3": "latent attention, groups of experts, a dense first layer",
    "mamba2": "recurrent",
    "jamba": "recurrent, attention and experts by turns",
    "qwen3_5_mtp": "linear attention, and a block that is never run",
    "lfm2": "convolutions and attention",
    "qwen3_vl": "the part for text of a model that sees",
    "gpt_neox": "attention and MLP side by side, heads of which a part is rotated",
    "dots1": "a router of which the config says nothing",
    "qwen3_5_lost_mtp": "the config names a block that is not there",
    "qwen3_vl_moe": "experts that are transposed",
    "bitnet": "the converter does not know a tensor",
}
DRAFTERS = {"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"}
"""Converted beside the model that they draft for, not alone."""


@pytest.fixture(scope="module")
def found(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What came of each, as in the table."""
    table = tmp_path_factory.mktemp("architectures") / "table.tsv"
    # Forks of this process might wait for locks that threads of other tests hold.
    ran = subprocess.run(
        [sys.executable, "-m", "tests.architectures", "--out", table, "--only", *CHOSEN],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert table.exists(), ran.stdout + ran.stderr
    with table.open(encoding="utf-8") as lines:
        rows = {row["recipe"]: row for row in csv.DictReader(lines, delimiter="\t")}
    assert ran.returncode == any(row["as expected"] != "yes" for row in rows.values())
    return rows


@pytest.mark.parametrize("name", CHOSEN)
def test_verdict(name: str, found: dict[str, dict]) -> None:
    row = found[name]
    assert row["as expected"] == "yes", f"{CHOSEN[name]}: {row}"


def test_what_the_converter_and_transformers_know_has_a_recipe(native: NativeBuild) -> None:
    module = ast.parse((native.scripts / "conversion" / "__init__.py").read_text())
    known = next(
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP"
    )
    made = {
        factory.ARCHITECTURES[row.factory].class_name if row.factory else row.class_name
        for row in RECIPES.values()
    }
    both = known.keys() & set(dir(transformers))
    assert {name for name in both if name.endswith("ForCausalLM")} - made == DRAFTERS
    assert len(both & made) > 100


def test_all_of_the_factory_is_there() -> None:
    rows = {row.factory for row in RECIPES.values()}
    assert factory.ARCHITECTURES.keys() <= rows


def test_variants() -> None:
    rows = {
        "base": Row("Llama", {"a": 1, "b": 1}, tokenizer="spm", expected=differs("x")),
        "variant": Row(of="base", config={"b": 2}),
    }
    whole = resolved(rows)["variant"]
    assert whole == Row("Llama", {"a": 1, "b": 2}, tokenizer="spm")
    assert whole.class_name == "LlamaForCausalLM"
    assert Row("Qwen3VL", parts={}).class_name == "Qwen3VLForConditionalGeneration"
    assert Row("GPT2LMHeadModel").class_name == "GPT2LMHeadModel"


def test_expectations() -> None:
    expected = differs("sliding_window", "sliding_window=32")
    said = "function: predictions differ; the converter does not read sliding_window=32"
    assert expected.met_by(Verdict(Kind.DIFFERS, said))
    assert not expected.met_by(Verdict(Kind.DIFFERS, "function: predictions differ"))
    assert not expected.met_by(Verdict(Kind.DIFFERS, "tokens: sliding_window=32"))
    assert not expected.met_by(Verdict(Kind.NEARLY, said))
    assert OK.met_by(Verdict(Kind.OK))
    assert not OK.met_by(Verdict(Kind.FAULT))


def test_the_same_bytes_again(tmp_path: Path) -> None:
    for kind in vocabularies.KINDS:
        vocabularies.write(kind, tmp_path / "tokenizers" / kind, VOCAB)
    one, two = (make("lfm2_moe", tmp_path / name, tmp_path / "tokenizers") for name in "ab")
    names = {path.name for path in one.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_what_breaks_in_a_fork_breaks_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert isolated(lambda: {"a": 1}, log) == {"a": 1}
    with pytest.raises(EndedError, match="SIGKILL"):
        isolated(lambda: os.kill(os.getpid(), signal.SIGKILL), log)
    with pytest.raises(EndedError, match="status 3"):
        isolated(lambda: os._exit(3), log)
    with pytest.raises(ZeroDivisionError):
        isolated(lambda: 1 / 0, log)
    assert "ZeroDivisionError" in log.read_text()
