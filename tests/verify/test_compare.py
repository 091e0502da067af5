"""What differs is named, with an example; what float rounding does is none of it."""

from pathlib import Path

import numpy as np
import pytest

from ggufkit.llamacpp.metadata import Metadata
from ggufkit.values import GGUFFile
from ggufkit.verify import compare, probe
from ggufkit.verify.values import DifferenceError, Mismatch, Verification, notes_of


def metadata(**keys: object) -> Metadata:
    spelled = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return Metadata(GGUFFile(Path("x.gguf"), 3, 0, spelled, ()))


def names(found: list[Mismatch]) -> list[tuple[str, bool]]:
    return [(m.name, m.error) for m in found]


def test_lines_are_judged_by_what_they_hold() -> None:
    expected = [
        ["plain", "one", [1]],
        ["plain", "two", [2, 3]],
        ["rare", "\u00ad", [4]],
        ["control", "<s>", [5]],
        ["added", "<x>", [6]],
    ]
    assert compare.lines(expected, [[1], [2, 3], [4], [5], [6]]) == []
    found = compare.lines(expected, [[1], [2, 9], None, [0], [6]])
    assert names(found) == [("tokens", True), ("unusual-text", False)]
    assert found[0].message == (
        "1 of 2 lines of text become other tokens; 'two' is [2 3] in the checkpoint, [2 9] in "
        "the GGUF"
    )
    assert found[1].message.startswith(
        "1 of 1 lines of rare characters, 1 of 1 lines with control tokens spelled in the text "
        "become other tokens; "
    )
    assert "not to be expressed in the GGUF" in found[1].message


def test_the_shortest_line_is_the_example() -> None:
    expected = [["plain", "a long line", [1]], ["plain", "a", [2]]]
    (found,) = compare.lines(expected, [[0], [0]])
    assert "'a' is [2]" in found.message


VOCABULARY = {
    "texts": ["<unk>", "\u2581a", "b", None, "<x y>"],
    "added": [{"id": 4, "content": "<x y>", "special": True}],
    "special": {"bos": 1, "unk": 0},
}


def test_a_vocabulary_with_blanks_spelled_either_way_is_the_same() -> None:
    keys = {"token_type": [2, 1, 1, 5, 3], "bos_token_id": 1, "unknown_token_id": 0}
    for spelled in ("<x y>", "<x\u2581y>"):
        tokens = ["<unk>", "\u2581a", "b", "[PAD3]", spelled]
        assert compare.vocabulary(VOCABULARY, metadata(tokens=tokens, **keys)) == []


def test_lost_texts_kinds_and_special_tokens_are_named() -> None:
    got = metadata(
        tokens=["<unk>", "\u2581a", "c", "[PAD3]", "<x y>"],
        token_type=[2, 1, 1, 5, 1],
        bos_token_id=2,
    )
    found = compare.vocabulary(VOCABULARY, got)
    assert names(found) == [("vocabulary", True), ("token-kinds", True), ("vocabulary", True)]
    assert "token 2 is 'b' in the checkpoint, 'c' in the GGUF" in found[0].message
    assert "BOS token is 1 in the checkpoint and 2" in found[2].message


def test_a_vocabulary_that_ends_early_is_another() -> None:
    (found,) = compare.vocabulary(
        {**VOCABULARY, "added": [], "special": {}}, metadata(tokens=["<unk>", "\u2581a"])
    )
    assert "2 of 5 tokens" in found.message
    assert "missing in the GGUF" in found.message


def test_wordpiece_is_stored_with_its_beginnings_marked() -> None:
    expected = {"texts": ["[CLS]", "in", "##side"], "added": [], "special": {}}
    got = metadata(model="bert", tokens=["[CLS]", "\u2581in", "side"])
    assert compare.vocabulary(expected, got) == []


def test_end_tokens_of_the_checkpoint_must_end_answers() -> None:
    got = metadata(tokens=["a", "<e>", "<f>"])
    assert compare.end_tokens([1, 99], [1, 2], got) == []
    (found,) = compare.end_tokens([1, 2], [1], got)
    assert names([found]) == [("end-tokens", True)]
    assert "'<f>' (2)" in found.message


def row(*texts: str, refused: str = "") -> dict[str, object]:
    return {"name": "turns", "texts": list(texts), "refused": refused}


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        (row("a"), {"text": "a"}, True),
        (row("a", "b"), {"text": "b"}, True),
        (row("a"), {"text": "c"}, False),
        (row("a"), {"refused": "no"}, False),
        # A runtime may know a form that the template takes.
        (row(refused="no"), {"text": "c"}, False),
    ],
)
def test_prompts_are_the_same_in_any_form_that_the_template_takes(
    expected: dict[str, object], got: dict[str, str], same: bool
) -> None:
    found = compare.conversations([expected], [got])
    assert (not found) == same
    assert same or names(found) == [("template", True)]


def test_a_template_that_renders_nothing_is_a_warning() -> None:
    (found,) = compare.conversations([row(refused="no")], [{"refused": "broken"}])
    assert (found.name, found.error) == ("template", False)
    assert "no conversation can be rendered: broken" in found.message


def test_a_conversation_that_both_refuse_is_none() -> None:
    rows = [row("a"), row(refused="no")]
    assert compare.conversations(rows, [{"text": "a"}, {"refused": "no"}]) == []


def test_an_example_begins_where_prompts_part() -> None:
    (found,) = compare.conversations(
        [row("the same beginning, then this")], [{"text": "the same beginning, then that"}]
    )
    assert "'g, then this' in the checkpoint" in found.message


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 50)).astype(np.float32)


def test_float_noise_is_no_difference_and_another_function_is() -> None:
    exact = logits()
    found, figures = compare.function(exact, None, exact + np.float32(1e-4), [0, 1, 2, 3], dict)
    assert found == []
    assert figures["kl_mean"] < 1e-8
    found, figures = compare.function(
        exact, None, logits(1), [4, 5, 6, 7], lambda: {"act": "relu2"}
    )
    assert names(found) == [("function", True)]
    assert "the converter does not read act=relu2" in found[0].message
    assert figures["kl_mean_limit"] == pytest.approx(1e-4)


def test_one_bad_position_is_enough() -> None:
    exact = np.repeat(logits(), 100, axis=0)
    got = exact.copy()
    got[7] = got[7][::-1]
    found, _ = compare.function(exact, None, got, list(range(400)), dict)
    assert found
    assert "after token 8" in found[0].message


def test_what_ggml_rounds_is_rounded_on_both_sides() -> None:
    exact = logits()
    rounded = exact + np.random.default_rng(2).normal(size=exact.shape).astype(np.float32) * 0.03
    found, figures = compare.function(exact, rounded, rounded, [0, 1, 2, 3], dict)
    assert found == []
    assert figures["kl_mean"] == pytest.approx(0, abs=1e-12)
    assert figures["kl_rounding"] > 1e-4
    assert figures["kl_mean_limit"] == pytest.approx(1e-4 + figures["kl_rounding"])


def test_predictions_that_are_no_numbers_are_another_function() -> None:
    got = logits()
    got[1, 3] = np.nan
    found, _ = compare.function(logits(), None, got, [0, 1, 2, 3], dict)
    assert names(found) == [("function", True)]


def test_a_padded_vocabulary_is_compared_on_the_common_tokens() -> None:
    exact = logits()
    padded = np.concatenate([exact, np.zeros((4, 14), np.float32)], axis=1)
    assert compare.function(exact, None, padded, [0, 1, 2, 3], dict)[0] == []


@pytest.mark.parametrize(
    ("config", "computed", "read", "expected"),
    [
        ({}, 0, 64, []),
        ({"sliding_window": None}, 0, 64, []),
        ({"sliding_window": 4096}, 0, 64, [("window", False)]),
        ({"sliding_window": 4096}, 4096, 64, []),
        ({"sliding_window": 512}, 0, 64, [("window", True)]),
        # The probe has seen it.
        ({"sliding_window": 32}, 0, 64, []),
        ({"sliding_window": 4096, "use_sliding_window": False}, 0, 64, []),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, 0, 64, []),
        ({"text_config": {"sliding_window": 1024}}, 0, 64, [("window", False)]),
    ],
)
def test_windows_beyond_the_probe(
    config: dict[str, object], computed: int, read: int, expected: list[tuple[str, bool]]
) -> None:
    assert names(compare.window(config, computed, read)) == expected


def test_a_probe_is_longer_than_a_window_that_is_affordable() -> None:
    assert probe.probe_length({"sliding_window": 512}, 10**6, 4096) == 536
    assert probe.probe_length({"sliding_window": 4096}, 7 * 10**9, 4096) == 24
    assert probe.probe_length({}, 10**9, 4096) == 40
    assert probe.probe_positions(24) == list(range(6, 24))
    assert probe.probe_length({}, 10**6, 4096) == 64
    assert probe.probe_length({}, 10**6, 32) == 32
    assert probe.probe_positions(536)[-24:] == list(range(512, 536))
    assert len(probe.probe_positions(64)) == len(probe.probe_positions(536)) == 48


def test_ids_are_shown_where_they_differ() -> None:
    (found,) = compare.lines([["plain", "x", [1, 2, 3, 4, 5, 6]]], [[1, 2, 3, 4, 9, 6]])
    assert "[... 2 3 4 5 6] in the checkpoint, [... 2 3 4 9 6]" in found.message


def test_a_quantized_file_that_is_far_away_is_suspicious() -> None:
    assert compare.far({"kl_mean": 0.3}) == []
    assert names(compare.far({"kl_mean": 3.2})) == [("function", False)]
    assert compare.far({}) == []


def test_what_a_tokenizer_replaces_is_tried() -> None:
    normalizer = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": "foo"}, "content": "bar"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            {"type": "NFC"},
        ],
    }
    assert probe.normalized_lines(normalizer) == ["before foo and foobehind"]
    assert probe.normalized_lines(None) == []


def test_errors_refuse_and_allowed_ones_are_notes() -> None:
    found = (Mismatch("function", True, "differs"), Mismatch("unusual-text", False, "odd"))
    verification = Verification(Path("m.gguf"), "model", found)
    with pytest.raises(DifferenceError, match="differs from the checkpoint model") as error:
        verification.require_same()
    assert "--allow-difference function" in error.value.hint
    assert [m.name for m in verification.warnings] == ["unusual-text"]
    allowed = Verification(verification.gguf, "model", found, allowed=("function",))
    allowed.require_same()
    notes = notes_of({"verification": allowed.facts})
    assert notes == (
        "warning: function: differs (allowed)",
        "warning: unusual-text: odd",
    )
    assert notes_of({"verification": "skipped"}) == (
        "not compared with the checkpoint: --no-verify",
    )
    assert notes_of({}) == ()
