"""llama.cpp's converter, made to read ``config.json`` as it is written."""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ggufkit.checkpoint import open_checkpoint
from ggufkit.checkpoint.config import suspicious_keys
from ggufkit.checkpoint.prepare import prepare_checkpoint
from ggufkit.errors import ToolError
from ggufkit.llamacpp import converter, toolchain
from ggufkit.llamacpp.converter import (
    ROUTERS,
    STOP_TOKENS,
    Reading,
    RecordedConfig,
    end_token_keys,
    merge,
    translate,
)
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.checkpoint.odd import ODD, write_odd
from tests.factory import break_architecture, edit_config, make_checkpoint, write_demo_tokenizer

# What a config becomes.


def test_a_key_of_the_file_keeps_its_value() -> None:
    raw = {"rotary_pct": 0.25, "head_dim": None, "text_config": {"a": 1}, "limit": [0, 2]}
    known = {"head_dim": 64, "text_config": {"a": 2, "b": 3}, "limit": [0, 1], "c": 4}
    assert merge(raw, known) == {
        "rotary_pct": 0.25,
        "head_dim": 64,
        "text_config": {"a": 1, "b": 3},
        "limit": [0, 2],
        "c": 4,
    }


def test_infinity_as_transformers_spells_it_is_left_to_the_class() -> None:
    raw = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    infinite = {"time_step_limit": [0.0, float("inf")]}
    assert merge(raw, infinite) == infinite


def translated(config: dict[str, Any], *, no_mtp: bool = False) -> tuple[dict[str, Any], Reading]:
    reading = Reading()
    translate(config, reading, no_mtp=no_mtp)
    return config, reading


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"partial_rotary_factor": 0.25}},
            {"rotary_pct": 0.25},
        ),
        ({"model_type": "cohere2", "rope_parameters": {"rope_theta": 1e4}}, {"rotary_pct": 1.0}),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "attention"]},
            {"layer_types": ["mamba", "attention"]},
        ),
        (
            {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp", "attention"]},
            {"hybrid_override_pattern": "M-*"},
        ),
        (
            {"model_type": "mimo_v2_flash", "num_key_value_heads": 2, "head_dim": 24},
            {"swa_num_key_value_heads": 4, "swa_head_dim": 24},
        ),
        ({"model_type": "afmoe"}, {"score_func": "sigmoid", "route_norm": True}),
        ({"model_type": "dots1", "scoring_func": "softmax"}, {"scoring_func": "softmax"}),
        (
            {"text_config": {"model_type": "dots1"}},
            {"text_config": {"model_type": "dots1", "scoring_func": "sigmoid"}},
        ),
    ],
)
def test_keys_of_transformers_5_get_their_published_names(
    config: dict[str, Any], wanted: dict[str, Any]
) -> None:
    found, _ = translated(config)
    assert {key: found[key] for key in wanted} == wanted


def test_falcon_has_one_head_for_keys_whatever_the_config_says() -> None:
    assert "num_kv_heads" not in translated({"model_type": "falcon", "num_kv_heads": 4})[0]
    grouped = {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 4}
    assert translated(grouped)[0]["num_kv_heads"] == 4


def test_a_dense_nemotron_h_has_no_keys_of_a_mixture() -> None:
    dense = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*-"}
    assert "num_experts_per_tok" not in translated({**dense, "num_experts_per_tok": 2})[0]
    mixture = {**dense, "hybrid_override_pattern": "ME*E", "num_experts_per_tok": 2}
    assert translated(mixture)[0]["num_experts_per_tok"] == 2


def test_layers_that_are_not_there_are_not_announced() -> None:
    config = {"mtp_num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    assert set(translated(dict(config), no_mtp=True)[0].values()) == {0}
    assert set(translated(dict(config))[0].values()) == {1}


_CODE = {
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "glm_moe_dsa": "GlmMoeDsa",
    "dots1": "Dots1",
    "exaone_moe": "ExaoneMoe",
    "afmoe": "Afmoe",
    "mimo_v2_flash": "MiMoV2Flash",
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_are_computed_so_by_transformers(kind: str) -> None:
    """The table is right only as long as transformers' code says the same."""
    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    code = "".join(
        inspect.getsource(cls)
        for name, cls in vars(module).items()
        if name.startswith(_CODE[kind])
        and inspect.isclass(cls)
        and cls.__module__ == module.__name__
        and ("Moe" in name.removeprefix(_CODE[kind]) or "MoE" in name or "Router" in name)
    )
    assert "sigmoid(" in code
    assert "softmax(" not in code
    if ROUTERS[kind].get("route_norm"):
        assert "/ denominator" in code or "sum(dim=-1, keepdim=True)" in code


def test_what_is_asked_for_is_noted() -> None:
    reading = Reading()
    config = RecordedConfig(
        {"a": 1, "b": 2, "c": 3, "text_config": {"d": 4}, "rope_scaling": {"factor": 2}}, reading
    )
    assert config["a"] == 1
    assert "b" in config
    assert config.get("x", 5) == 5
    assert config["text_config"]["d"] == 4
    assert config["rope_scaling"].get("factor") == 2
    assert config.pop("c") == 3
    assert {**config}["b"] == 2
    assert reading.read == {
        "a",
        "b",
        "x",
        "d",
        "c",
        "text_config",
        "rope_scaling",
        "rope_scaling.factor",
    }
    with pytest.raises(KeyError):
        config["missing"]


@pytest.mark.parametrize(
    ("ends", "tokens", "eos", "wanted"),
    [
        ([2, 3], ["a", "b", "</s>", "<x>"], 2, ({"eot": 3}, [])),
        ([2], ["a", "b", "</s>"], None, ({"eos": 2}, [])),
        ([0, 1, 2, 3, 9], ["a", "b", "c", "d"], 0, ({"eot": 1, "eom": 2}, [3])),
        # llama.cpp finds the end of a turn by its text; that stays its place.
        ([2, 3], ["<|im_end|>", "b", "</s>", "<x>"], 2, ({"eom": 3}, [])),
        ([2, 3], [b"<|eot_id|>", b"<|eom_id|>", b"</s>", b"<x>"], 2, ({}, [3])),
        ([], ["a"], None, ({}, [])),
    ],
)
def test_where_end_tokens_go(
    ends: list[int], tokens: list[Any], eos: int | None, wanted: tuple[dict[str, int], list[int]]
) -> None:
    assert end_token_keys(ends, tokens, eos) == wanted


def test_it_imports_nothing_of_ours() -> None:
    code = f"import runpy, sys; runpy.run_path({converter.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert not [name for name in done.stdout.split() if name.startswith(("ggufkit", "torch"))]


# Keys that may be why a function differs.


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"hidden_act": "relu2"}, {"hidden_act": "relu2"}),
        (
            {"hidden_act": "silu", "use_cache": True, "bos_token_id": 1, "attention_dropout": 0.5},
            {},
        ),
        ({"sliding_window": 4096}, {"sliding_window": 4096}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {}),
        ({"no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 0]}),
        ({"layer_types": ["full_attention"] * 2}, {}),
        ({"layer_types": ["sliding_attention"]}, {"layer_types": ["sliding_attention"]}),
        ({"final_logit_softcapping": None}, {"final_logit_softcapping": None}),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_scaling.rope_type": "dynamic"},
        ),
    ],
)
def test_suspicious_keys(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    defaults = {"hidden_act": "silu", "sliding_window": 4096, "final_logit_softcapping": 30.0}
    unread = {key: value for key, value in config.items() if not isinstance(value, dict)}
    report = {"unread": unread, "class_defaults": defaults}
    assert suspicious_keys(report, config) == wanted


# The real converter.


def convert(native: NativeBuild, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Convert a checkpoint as the product does; gives the report."""
    scratch = out.with_suffix(".prepared")
    prepared = prepare_checkpoint(open_checkpoint(checkpoint), scratch)
    report = out.with_suffix(".json")
    toolchain.convert_checkpoint(
        native,
        prepared.path,
        out,
        outtype="f32",
        name=checkpoint.name,
        options=prepared.converter_options,
        report=report,
        log=out.with_suffix(".log"),
    )
    found: dict[str, Any] = json.loads(report.read_text())
    return found


_RUN = """
import math, sys
from pathlib import Path
from ggufkit.llamacpp.batching import Model
for path in sys.argv[1:]:
    model = Model(Path(path))
    lib = model.library
    params = lib.llama_context_default_params()
    params.n_ctx = 64
    context = lib.llama_init_from_model(model.pointer, params)
    tokens = (lib.llama_token * 8)(*range(20, 28))
    assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, 8)) == 0
    logits = lib.llama_get_logits_ith(context, -1)
    assert all(math.isfinite(logits[i]) for i in range(100))
    print(Path(path).stem, flush=True)
"""


@pytest.fixture(scope="module")
def tokenizer(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_tokenizer(demo_gguf, tmp_path_factory.mktemp("tokenizer"))


def test_checkpoints_of_transformers_5_convert_and_run(
    native: NativeBuild, tokenizer: Path, tmp_path: Path
) -> None:
    made = []
    for name in ODD:
        checkpoint = write_odd(name, tmp_path / "checkpoints" / name, tokenizer)
        convert(native, checkpoint, out := tmp_path / f"{name}.gguf")
        made.append(str(out))
    done = subprocess.run([sys.executable, "-c", _RUN, *made], capture_output=True, text=True)
    assert done.stdout.split() == list(ODD), done.stderr[-2000:]


def test_the_report_says_what_was_not_read(native: NativeBuild, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", hidden=64, vocab=384)
    edit_config(checkpoint, hidden_act="relu2")
    report = convert(native, checkpoint, tmp_path / "tiny.gguf")
    assert report["converter"] == "LlamaModel"
    assert {"hidden_size", "num_attention_heads", "rope_theta"} <= set(report["read"])
    assert report["unread"]["hidden_act"] == "relu2"
    assert report["class_defaults"]["hidden_act"] == "silu"
    config = json.loads((checkpoint / "config.json").read_text())
    assert suspicious_keys(report, config) == {"hidden_act": "relu2"}


def test_end_tokens_are_in_the_file(native: NativeBuild, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", hidden=64, vocab=384)
    edit_config(checkpoint, eos_token_id=[2, 10, 11])
    convert(native, checkpoint, out := tmp_path / "tiny.gguf")
    metadata = read_gguf(out).metadata
    # The vocabulary has <|im_end|>, which llama.cpp takes as the end of a turn.
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.eot_token_id" not in metadata
    assert metadata["tokenizer.ggml.eom_token_id"] == 10
    assert metadata[STOP_TOKENS] == [11]
    look = Metadata(read_gguf(out))
    assert look.stop_token_ids == {11}
    assert {look.tokens[n] for n in (2, 10, 11)} <= set(look.end_tokens)


def test_a_failure_is_explained_and_reported(native: NativeBuild, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", hidden=64, vocab=384)
    break_architecture(checkpoint)
    with pytest.raises(ToolError, match="does not know the architecture NobodyForCausalLM"):
        convert(native, checkpoint, tmp_path / "tiny.gguf")
    assert json.loads((tmp_path / "tiny.json").read_text())["converter"] == ""
