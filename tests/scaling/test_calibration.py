import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
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
    characters = sum(map(len, documents))
    assert cut.facts["characters"] == cut.facts["characters_read"] == characters


def test_all_tokens_are_there_in_their_order(index: CheckpointIndex) -> None:
    """Asked for more than there is, sequences miss but the last incomplete piece."""
    tokenizer = AutoTokenizer.from_pretrained(index.path)
    documents = [TEXT[:2000], "a short one", TEXT[2000:9000]]
    tokens = [t for d in documents for t in tokenizer(d, add_special_tokens=False).input_ids]
    body = 31
    cut = cut_sequences(documents, index, samples=10**6, length=body + 1)
    assert len(cut.tokens) + len(cut.held_back) == len(tokens) // body
    found = {tuple(piece[1:].tolist()) for piece in (*cut.tokens, *cut.held_back)}
    slack = len(tokens) % body
    covered = sum(
        any(tuple(tokens[start + off : start + off + body]) in found for off in range(slack + 1))
        for start in range(0, len(tokens) - body - slack + 1, body)
    )
    assert covered == len(tokens) // body


def test_a_seed_chooses_by_chance_and_always_the_same(index: CheckpointIndex) -> None:
    first, again, other, even = (
        cut_sequences([TEXT], index, samples=4, length=32, seed=seed).tokens
        for seed in (1, 1, 2, None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, even)


def test_a_seed_chooses_pieces_without_replacement(index: CheckpointIndex) -> None:
    cut = cut_sequences([TEXT], index, samples=10**6, length=32, seed=7)
    everything = {tuple(s.tolist()) for s in (*cut.tokens, *cut.held_back)}
    assert len(everything) == len(cut.tokens) + HELD_BACK == cut.facts["tokens_available"] // 31


def test_windows_of_a_very_long_text_are_enough(index: CheckpointIndex) -> None:
    cut = cut_sequences([TEXT * 20], index, samples=4, length=32)
    assert cut.tokens.shape == (4, 32)
    assert cut.facts["tokens_available"] < 100 * 12 * 32
    assert cut.facts["characters"] == len(TEXT) * 20
    assert cut.facts["characters_read"] < 8 * 12 * 32 + 1


@pytest.mark.parametrize(
    "text",
    ["\u4e16\u754c\u4f60\u597d" * 20_000, ("-" * 70 + "\n") * 6000, " " * 10**6 + TEXT],
    ids=["no spaces", "drawn lines", "mostly blank"],
)
def test_windows_of_odd_texts_are_enough(text: str, index: CheckpointIndex) -> None:
    cut = cut_sequences([text], index, samples=4, length=32)
    assert cut.tokens.shape == (4, 32)
    assert cut.held_back.shape == (HELD_BACK, 32)
    assert cut.facts["characters_read"] < len(text)


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


def test_a_template_may_refuse_a_chat(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    path = write_rows(tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": system})
    with pytest.raises(CheckpointError, match=r"line 2 of chats\.jsonl: .*No system") as told:
        read_documents(path, open_checkpoint(model))
    assert "system message" in told.value.hint


@pytest.mark.parametrize("role", ["developer", "system"])
def test_other_names_of_roles(role: str, index: CheckpointIndex, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "chats.jsonl", {"messages": [{"role": role, "content": "x"}, *CHAT]}
    )
    (document,), _ = read_documents(path, index)
    assert document.startswith("<|im_start|>system\nx")


def test_what_else_a_row_says_is_left_aside(index: CheckpointIndex, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.json", {"id": 1, "messages": CHAT, "text": "other"})
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes() + b"\n")
    documents, kind = read_documents(path, index)
    assert (len(documents), kind) == (1, "chats")
    assert "other" not in documents[0]


def test_the_context_of_an_instruction_follows_it(index: CheckpointIndex, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    (document,), _ = read_documents(write_rows(tmp_path / "pairs.jsonl", row), index)
    assert "user\nAdd.\n\n1, 2<|im_end|>" in document
    assert "assistant\n3<|im_end|>" in document


def test_control_tokens_of_the_template_are_tokens(index: CheckpointIndex, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", *[{"messages": CHAT}] * 20)
    documents, _ = read_documents(path, index)
    cut = cut_sequences(documents, index, samples=4, length=32)
    start = AutoTokenizer.from_pretrained(index.path).convert_tokens_to_ids("<|im_start|>")
    assert int((cut.tokens == start).sum()) > 0


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"question": "q"}, "has no 'answer'"),
        ({"question": "q", "answer": None}, "has no 'answer'"),
        ({"question": ["q"], "answer": "a"}, "'question' is not text"),
        ({"question": "q", "input": 7, "answer": "a"}, "'input' is not text"),
        ({"question": "q", "answer": "\ud800"}, "half a surrogate pair"),
        ({"question": "q", "answer": " "}, "'answer' is blank"),
        ([], "no JSON object"),
    ],
    ids=str,
)
def test_a_line_that_is_no_pair_is_named(
    bad: Any, why: str, index: CheckpointIndex, tmp_path: Path
) -> None:
    good = {key: "some" for key in bad} or {"question": "q", "answer": "a"}
    path = write_rows(tmp_path / "pairs.jsonl", {"answer": "a", **good}, bad)
    with pytest.raises(GgufkitError, match=why) as told:
        read_documents(path, index)
    assert "line 2 of pairs.jsonl" in told.value.message
    assert told.value.hint


@pytest.mark.parametrize("line", [b'{"messages": [', b'{"messages": "\xff"}', b"[" * 100_000])
def test_a_line_that_is_no_json_is_named(
    line: bytes, index: CheckpointIndex, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "chats.jsonl", {"messages": CHAT})
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(GgufkitError, match=r"line 2 of chats\.jsonl is not JSON") as told:
        read_documents(path, index)
    assert told.value.hint


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": []}, "without turns"),
        ({"messages": "hello"}, "without turns"),
        ({"messages": ["hello"]}, "no object"),
        ({"messages": [{"content": "x"}]}, "has no 'role'"),
        ({"messages": [{"role": "user"}]}, "has no 'content'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "line 2"),
        ({"messages": [{"role": "user", "content": [1]}]}, "not text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"text": "no chat"}, "without turns"),
        ("hello", "no JSON object"),
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


# --- rendered as transformers does ---

CALLS = """\
{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>
{% endif %}{% for m in messages %}<{{ m.role }}>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content or "" }}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }}
{{- c.function.arguments | tojson }}</call>{% endfor %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
PARTS = """\
{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}
{% endfor %}"""
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {"x": [1]}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SYSTEM = {"role": "system", "content": "Speak like a sailor."}
ANSWERED = [
    {"role": "user", "content": "w?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "ok"},
    {"role": "assistant", "content": "fine", "reasoning_content": "It is over."},
]


def with_template(directory: Path, template: Any) -> Path:
    """A checkpoint with a template of its own; None for none."""
    model = make_checkpoint(directory / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    config |= {} if template is None else {"chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    return model


class Log:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize("template", ["own", CALLS], ids=["chatml", "calls"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_a_row_says_reaches_the_template(
    template: str, suffix: str, index: CheckpointIndex, tmp_path: Path
) -> None:
    """Calls, functions, reasoning, system and history, as transformers renders them."""
    if template != "own":
        index = open_checkpoint(with_template(tmp_path, template))
    tokenizer = AutoTokenizer.from_pretrained(index.path)
    chats = [{"messages": [SYSTEM, *ANSWERED], "tools": [LOOK]}, {"messages": CHAT}]
    path = tmp_path / f"chats{suffix}"
    if suffix == ".jsonl":
        write_rows(path, *chats)
    else:
        columns = {key: [chat.get(key) for chat in chats] for key in ("messages", "tools")}
        parquet.write_table(pa.table(columns), path)
    expected = [
        tokenizer.apply_chat_template(chat["messages"], tools=chat.get("tools"), tokenize=False)
        for chat in chats
    ]
    documents, _ = read_documents(path, index)
    assert documents == expected
    assert "sailor" in documents[0]
    if template == CALLS:
        assert '<call>look{"x": [1]}</call>' in documents[0]
        assert "<think>It is over.</think>" in documents[0]
        assert '<tools>[{"type": "function"' in documents[0]
        assert "<tools>" not in documents[1]


def test_system_and_history_of_pairs_are_turns(index: CheckpointIndex, tmp_path: Path) -> None:
    row = {
        **{"system": SYSTEM["content"], "instruction": "third", "input": "", "output": "c"},
        "history": [["first", "a"]],
    }
    turns = [
        SYSTEM,
        *({"role": "user", "content": "first"}, {"role": "assistant", "content": "a"}),
        *({"role": "user", "content": "third"}, {"role": "assistant", "content": "c"}),
    ]
    tokenizer = AutoTokenizer.from_pretrained(index.path)
    assert read_documents(write_rows(tmp_path / "pairs.jsonl", row), index) == (
        [tokenizer.apply_chat_template(turns, tokenize=False)],
        "pairs",
    )


def test_a_template_that_wants_parts_gets_parts(tmp_path: Path) -> None:
    model = with_template(tmp_path, PARTS)
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    theirs = AutoTokenizer.from_pretrained(model).apply_chat_template(parts, tokenize=False)
    assert "share a scale" in theirs
    path = write_rows(tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": parts})
    assert read_documents(path, open_checkpoint(model))[0] == [theirs, theirs]


def test_parts_are_text_where_a_template_wants_text(index: CheckpointIndex, tmp_path: Path) -> None:
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    theirs = AutoTokenizer.from_pretrained(index.path).apply_chat_template(CHAT, tokenize=False)
    path = write_rows(tmp_path / "chats.jsonl", {"messages": parts})
    assert read_documents(path, index)[0] == [theirs]


def test_the_template_of_tools_is_for_conversations_with_tools(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain {{ messages | length }}"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    index = open_checkpoint(with_template(tmp_path, named))
    rows = {"messages": CHAT}, {"messages": CHAT, "tools": [LOOK]}
    documents, _ = read_documents(write_rows(tmp_path / "chats.jsonl", *rows), index)
    assert documents == ["plain 2", "1 tools"]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"question": "q", "answer": "a"}], ids=str)
def test_named_templates_without_a_default_are_named(row: dict[str, Any], tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    index = open_checkpoint(with_template(tmp_path, named))
    with pytest.raises(CheckpointError, match="rag, tool_use"):
        read_documents(write_rows(tmp_path / "chats.jsonl", row), index)


def test_the_file_of_the_template_comes_first(tmp_path: Path) -> None:
    model = with_template(tmp_path, "old")
    (model / "chat_template.jinja").write_text("new")
    path = write_rows(tmp_path / "chats.jsonl", {"messages": CHAT})
    assert read_documents(path, open_checkpoint(model))[0] == ["new"]


def test_what_a_template_leaves_out_is_counted(index: CheckpointIndex, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": ANSWERED, "tools": [LOOK]}
    )
    log = Log()
    read_documents(path, index, progress=log)  # type: ignore[arg-type]
    for what in ("tools", "calls", "reasoning"):
        told = f"1 of 2 conversations have {what}, which the chat template leaves out"
        assert any(told in warning for warning in log.warnings)
    everything = open_checkpoint(with_template(tmp_path, CALLS))
    log = Log()
    read_documents(path, everything, progress=log)  # type: ignore[arg-type]
    assert log.warnings == []


def test_rows_left_out_are_counted(index: CheckpointIndex, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", *[{"messages": CHAT}] * 3, {"messages": []})
    log = Log()
    documents, _ = read_documents(path, index, progress=log)  # type: ignore[arg-type]
    assert len(documents) == 3
    assert "1 of 4 rows is left out" in log.warnings[0]
