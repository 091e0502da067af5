import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.errors import CheckpointError, GgufkitError
from ggufkit.scaling.calibration import HELD_BACK, cut_sequences, read_documents, text_of
from tests.factory import make_checkpoint

TEXT = " ".join(f"word{i}" for i in range(3000))
CHAT = [
    {"role": "user", "content": "What is a block?"},
    {"role": "assistant", "content": "A few weights that share a scale."},
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model")))


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sequences_are_spread_over_the_text(index: CheckpointIndex) -> None:
    cut = cut_sequences([TEXT], index, samples=4, length=32)
    assert cut.tokens.shape == (4, 32)
    assert cut.held_back.shape == (HELD_BACK, 32)
    bos = index.config["bos_token_id"]
    for sequence in (*cut.tokens, *cut.held_back):
        assert sequence[0] == bos
    everything = {tuple(s.tolist()) for s in (*cut.tokens, *cut.held_back)}
    assert len(everything) == 4 + HELD_BACK
    last = AutoTokenizer.from_pretrained(index.path)(TEXT).input_ids[-10:]
    assert any(list(piece[-10:]) == last for piece in everything)


def test_what_is_held_back_is_seen_by_nobody(index: CheckpointIndex) -> None:
    cut = cut_sequences([TEXT], index, samples=10**6, length=64)
    assert len(cut.held_back) == HELD_BACK
    assert cut.facts["sequences"] == len(cut.tokens)
    assert len(cut.tokens) + HELD_BACK == cut.facts["tokens_available"] // 63
    held = {tuple(s.tolist()) for s in cut.held_back}
    assert not held & {tuple(s.tolist()) for s in cut.tokens}
    told = text_of(cut.held_back[:1], index)
    assert told.strip()[5:60] in TEXT


def test_long_documents_are_cut_and_short_ones_joined(index: CheckpointIndex) -> None:
    tokenizer = AutoTokenizer.from_pretrained(index.path)
    documents = ["a short one"] * 300 + [TEXT]
    expected = sum(len(tokenizer(d, add_special_tokens=False).input_ids) for d in documents)
    cut = cut_sequences(documents, index, samples=8, length=32)
    assert cut.facts["tokens_available"] == expected
    assert cut.facts["documents"] == 301


def test_a_seed_chooses_by_chance_and_always_the_same(index: CheckpointIndex) -> None:
    first, again, other, even = (
        cut_sequences([TEXT], index, samples=4, length=32, seed=seed).tokens
        for seed in (1, 1, 2, None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, even)


def test_windows_of_a_very_long_text_are_enough(index: CheckpointIndex) -> None:
    cut = cut_sequences([TEXT * 20], index, samples=4, length=32)
    assert cut.tokens.shape == (4, 32)
    assert cut.facts["tokens_available"] < 100 * 12 * 32


def test_too_little_text_is_refused(index: CheckpointIndex) -> None:
    with pytest.raises(GgufkitError, match=r"has only \d+ tokens") as told:
        cut_sequences(["too short"], index, samples=4, length=32)
    assert "--calibration" in told.value.hint


def test_plain_text_is_one_document(index: CheckpointIndex, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Some words.\n")
    assert read_documents(path, index) == (["Some words.\n"], "text")


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_chats_are_rendered_with_the_models_template(
    key: str, index: CheckpointIndex, tmp_path: Path
) -> None:
    share = [
        {"from": "human", "value": CHAT[0]["content"]},
        {"from": "gpt", "value": CHAT[1]["content"]},
    ]
    turns = CHAT if key == "messages" else share
    path = write_rows(tmp_path / "chats.jsonl", {key: turns}, {key: turns})
    documents, kind = read_documents(path, index)
    tokenizer = AutoTokenizer.from_pretrained(index.path)
    assert kind == "chats"
    assert documents == [tokenizer.apply_chat_template(CHAT, tokenize=False)] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
    ],
    ids=str,
)
def test_pairs_become_exchanges(
    row: dict[str, str], index: CheckpointIndex, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", row)
    tokenizer = AutoTokenizer.from_pretrained(index.path)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read_documents(path, index) == (
        [tokenizer.apply_chat_template(turns, tokenize=False)],
        "pairs",
    )


def test_without_a_template_pairs_are_text_and_chats_an_error(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    index = open_checkpoint(model)
    pairs = write_rows(tmp_path / "pairs.jsonl", {"question": "q", "answer": "a"})
    assert read_documents(pairs, index) == (["q\na"], "pairs")
    chats = write_rows(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(CheckpointError, match="has no chat template"):
        read_documents(chats, index)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": []}, "without turns"),
        ({"messages": [{"role": "user", "content": [1]}]}, "not text"),
        ({"text": "no chat"}, "line 2"),
    ],
    ids=str,
)
def test_a_line_that_is_no_chat_is_named(
    bad: Any, why: str, index: CheckpointIndex, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "chats.jsonl", {"messages": CHAT}, bad)
    with pytest.raises(GgufkitError, match=why) as told:
        read_documents(path, index)
    assert "line 2 of chats.jsonl" in told.value.message
