"""What can be mended in a checkpoint is mended here, before the converter sees it.

The result is a directory of links to the checkpoint's files, with rewritten JSON
files where transformers and llama.cpp's converter would read something else.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ggufkit.checkpoint.chat_template import (
    DEFAULT,
    PROCESSOR_TEMPLATE,
    TEMPLATE_DIRECTORY,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    CheckpointTemplates,
    read_templates,
)
from ggufkit.checkpoint.config import TEXT_PARTS, text_config, token_ids
from ggufkit.checkpoint.consistency import check_tensors, names_further_layers, predicts_further
from ggufkit.checkpoint.index import (
    SHARD_INDEX,
    WEIGHT_SUFFIXES,
    WHOLE,
    CheckpointIndex,
    TensorEntry,
    read_json,
)
from ggufkit.checkpoint.quantization import SECTIONS, section_of
from ggufkit.checkpoint.tokenizer import (
    AddedToken,
    added_tokens,
    embedding_rows,
    is_sentencepiece,
    pieces_of,
    surplus_tokens,
    vocabulary_texts,
)
from ggufkit.errors import CheckpointError
from ggufkit.values import Json

GENERATION_CONFIG = "generation_config.json"
QUANTIZATION_FILE = "hf_quant_config.json"
_COMPARE_NBYTES = 16 * 1024 * 1024
_PREFIXES = {"layers.": "model.", "h.": "transformer."}
"""Prefix that all tensors lack, by how those of the layers begin."""
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Prepared:
    """A checkpoint as the converter and all that reads it are to see it.

    Attributes:
        path: the directory: links, and the files that were mended.
        index: what it holds; names of tensors are those of transformers.
        notes: what was mended, one sentence each.
        no_mtp: whether the files hold no layers for multi-token prediction.
        end_tokens: ids at which an answer ends, the first as the end of the text.
        renamed: names of tensors in the files to those in ``index``, where they differ.
        dropped: names, as in ``index``, of tensors that repeat others.
    """

    path: Path
    index: CheckpointIndex
    notes: tuple[str, ...] = ()
    no_mtp: bool = False
    end_tokens: tuple[int, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def converter_options(self) -> dict[str, Json]:
        """What ``llamacpp/converter.py`` has to know beside the files."""
        return {
            "no_mtp": self.no_mtp,
            "end_tokens": list(self.end_tokens),
            "renamed": dict(self.renamed),
            "dropped": list(self.dropped),
        }


@dataclass
class _Mending:
    """Changes gathered so far.

    Attributes:
        index: the checkpoint, with what was changed.
        files: new contents of JSON files by name; None for files to leave out.
        notes: sentences about them.
        renamed, dropped: see :class:`Prepared`.
    """

    index: CheckpointIndex
    files: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def edit(self, name: str) -> dict[str, Any]:
        """The contents of a JSON file, to be changed; empty if there is none.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        content = self.files.get(name)
        if content is None:
            content = self.files[name] = read_object(self.index.path / name)
        return content


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; empty if there is no such file.

    Raises:
        CheckpointError: it is something else.
    """
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object", "Fetch the file again")
    return content


def prepare_checkpoint(index: CheckpointIndex, into: Path) -> Prepared:
    """Mend what can be mended of a checkpoint, and refuse what cannot.

    Args:
        index: the checkpoint.
        into: the directory to make; its parent must exist. The converter takes
            the model's name from it.

    Raises:
        CheckpointError: files of the checkpoint contradict each other.
        IntegrityError: a file is damaged.
    """
    mending = _Mending(index)
    for mend in _MENDS:
        mend(mending)
    check_tensors(mending.index)
    ends = _end_tokens(mending)
    no_mtp = not index.pickles and not predicts_further(mending.index)
    if no_mtp and (count := names_further_layers(mending.index)):
        mending.notes.append(
            f"config.json names {count} layer(s) for multi-token prediction that are not in the "
            "files; converted without"
        )
    _link(index, into, mending.files)
    return Prepared(
        into,
        replace(mending.index, path=into),
        tuple(mending.notes),
        no_mtp,
        ends,
        mending.renamed,
        tuple(mending.dropped),
    )


def _link(index: CheckpointIndex, into: Path, files: Mapping[str, dict[str, Any] | None]) -> None:
    """Links to all that belongs to the checkpoint, and the files that were mended."""
    into.mkdir()
    weights = {*index.shards, *index.pickles}
    for source in index.path.iterdir():
        name = source.name
        other = source.suffix in WEIGHT_SUFFIXES and name not in weights
        if not (name in files or name.startswith(".") or other):
            (into / name).symlink_to(source.absolute(), target_is_directory=source.is_dir())
    for name, content in files.items():
        if content is not None:
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (into / name).write_text(text, encoding="utf-8", errors="surrogatepass")


def _mend_shard_index(mending: _Mending) -> None:
    index = mending.index
    if index.shards == (WHOLE,) and (index.path / SHARD_INDEX).is_file():
        named = read_object(index.path / SHARD_INDEX).get("weight_map") or {}
        if WHOLE not in named.values():
            mending.files[SHARD_INDEX] = None
            mending.notes.append(
                f"{SHARD_INDEX} is of other files and was passed over: {WHOLE} holds all weights"
            )


def _mend_quantization(mending: _Mending) -> None:
    """A section that was left over: open_checkpoint has seen that all weights are floats."""
    config = mending.index.config
    section = section_of(config)
    if section is None or mending.index.pickles:
        return
    left = {key: value for key, value in config.items() if key not in SECTIONS}
    mending.files["config.json"] = left
    mending.files[QUANTIZATION_FILE] = None
    mending.index = replace(mending.index, config=left)
    method = section.get("quant_method") if isinstance(section, dict) else None
    mending.notes.append(
        f"config.json calls the weights quantized ({method or 'no method named'}), but all tensors "
        "are floats; that section was left out"
    )


def _mend_names(mending: _Mending) -> None:
    """Tensors of the bare model: all lack what stands before them in the whole one."""
    index = mending.index
    if not index.architectures[0].endswith(("ForCausalLM", "LMHeadModel")):
        return
    for start, prefix in _PREFIXES.items():
        if any(name.startswith(prefix) for name in index.tensors):
            return
        if f"{start}0." not in {name[: len(start) + 2] for name in index.tensors}:
            continue
        names = {n: n if n.startswith("lm_head.") else prefix + n for n in index.tensors}
        mending.renamed = {old: new for old, new in names.items() if old != new}
        mending.index = replace(
            index, tensors={names[n]: replace(e, name=names[n]) for n, e in index.tensors.items()}
        )
        mending.notes.append(
            f"the names of the tensors lack '{prefix}' in front; they were read as if they had it"
        )
        return


def _mend_tied_head(mending: _Mending) -> None:
    """An output matrix stored although the config says that it is the embedding."""
    index = mending.index
    head = index.tensors.get(_HEAD)
    embedding = next(
        (t for n, t in index.tensors.items() if n.endswith("embed_tokens.weight")), None
    )
    embedding = embedding or next(
        (t for n, t in index.tensors.items() if n.endswith("wte.weight")), None
    )
    if not (head and embedding and index.config.get("tie_word_embeddings")):
        return
    if head.shape != embedding.shape:
        return  # an error of its own
    if head.dtype == embedding.dtype and _same_bytes(index.path, head, embedding):
        mending.dropped.append(_HEAD)
        rest = {name: entry for name, entry in index.tensors.items() if name != _HEAD}
        mending.index = replace(index, tensors=rest)
        mending.notes.append(
            f"{_HEAD} repeats the embedding, which config.json ties it to; it was left out"
        )
        return
    config = {**index.config, "tie_word_embeddings": False}
    mending.files["config.json"] = config
    mending.index = replace(index, config=config)
    mending.notes.append(
        f"config.json ties the output matrix to the embedding, but {_HEAD} holds other weights; "
        "they are used, as transformers does"
    )


def _same_bytes(path: Path, one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of one dtype and shape are alike, without holding them."""
    with (path / one.shard).open("rb") as first, (path / other.shard).open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.nbytes
        while left > 0:
            size = min(left, _COMPARE_NBYTES)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _mend_surplus_tokens(mending: _Mending) -> None:
    """Added tokens past the last embedding, which the model cannot read."""
    path = mending.index.path
    surplus = surplus_tokens(mending.index)
    if not surplus:
        return
    texts = {token.content for token in surplus.values()}
    if (path / "tokenizer.json").is_file():
        content = mending.edit("tokenizer.json")
        kept = [t for t in content.get("added_tokens") or [] if int(t["id"]) not in surplus]
        content["added_tokens"] = kept
    if (path / "added_tokens.json").is_file():
        older = mending.edit("added_tokens.json")
        mending.files["added_tokens.json"] = {t: n for t, n in older.items() if t not in texts}
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        if (path / name).is_file():
            mending.files[name] = _without_tokens(mending.edit(name), texts)
    named = ", ".join(sorted(texts))
    mending.notes.append(
        f"{named}: added after the last of {embedding_rows(mending.index):,} embeddings, "
        "so the model cannot read it; left out of the vocabulary"
    )


def _without_tokens(value: Any, texts: set[str]) -> Any:
    """JSON without the entries that are, or describe, one of some tokens."""

    def names(entry: Any) -> bool:
        content = entry.get("content") if isinstance(entry, dict) else entry
        return isinstance(content, str) and content in texts

    if isinstance(value, dict):
        return {k: _without_tokens(v, texts) for k, v in value.items() if not names(v)}
    if isinstance(value, list):
        return [_without_tokens(entry, texts) for entry in value if not names(entry)]
    return value


def _mend_token_texts(mending: _Mending) -> None:
    """Tokens that only tokenizer.json has, where the converter reads tokenizer.model."""
    path = mending.index.path
    model, fast = path / "tokenizer.model", path / "tokenizer.json"
    if not (model.is_file() and fast.is_file()):
        return
    raw = model.read_bytes()
    if not is_sentencepiece(raw):
        return
    pieces = pieces_of(raw)
    rows = embedding_rows(mending.index)
    added = {n: token for n, token in added_tokens(path).items() if n < rows}
    config = mending.files.get(TOKENIZER_CONFIG) or read_object(path / TOKENIZER_CONFIG)
    known = config.get("added_tokens_decoder") or {}
    wanted = {
        number: AddedToken(text, False)
        for number, text in vocabulary_texts(path).items()
        if len(pieces) <= number < rows
    }
    wanted |= {n: t for n, t in added.items() if n >= len(pieces) or pieces[n][0] != t.content}
    missing = {n: token for n, token in wanted.items() if str(n) not in known}
    if not missing:
        return
    config = mending.edit(TOKENIZER_CONFIG)
    rows_of = {str(n): _decoder_row(token) for n, token in sorted(missing.items())}
    config["added_tokens_decoder"] = {**(config.get("added_tokens_decoder") or {}), **rows_of}
    shown = ", ".join(token.content for token in list(missing.values())[:3])
    mending.notes.append(
        f"{len(missing)} token(s) that only tokenizer.json knows got their text ({shown})"
    )


def _decoder_row(token: AddedToken) -> dict[str, Json]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token.content, **flags, "special": token.special}


def _mend_templates(mending: _Mending) -> None:
    """The chat template that transformers would use, where the converter looks first."""
    path = mending.index.path
    templates = read_templates(path)
    if _converter_templates(path) == dict(templates.named):
        return
    config = mending.edit(TOKENIZER_CONFIG)
    value = _template_value(templates)
    config["chat_template"] = value
    if value is None:
        del config["chat_template"]
    for name in (TEMPLATE_FILE, TEMPLATE_DIRECTORY, PROCESSOR_TEMPLATE):
        mending.files[name] = None
    where = templates.source or "none"
    mending.notes.append(
        f"the chat template is that of {where}, as transformers takes it; "
        "other files have another or none"
    )


def _template_value(templates: CheckpointTemplates) -> Json:
    """Templates as the converter reads them from tokenizer_config.json."""
    if set(templates.named) <= {DEFAULT}:
        return templates.default or None
    return [{"name": name, "template": text} for name, text in templates.named.items()]


def _converter_templates(path: Path) -> dict[str, str]:
    """Templates by name as the converter would find them (gguf-py's ``SpecialVocab``)."""
    if not (path / TOKENIZER_CONFIG).is_file():
        return {}
    other: Any = None
    if (path / TEMPLATE_FILE).is_file():
        other = read_templates(path).named
    elif (path / PROCESSOR_TEMPLATE).is_file():
        other = read_object(path / PROCESSOR_TEMPLATE).get("chat_template")
    value = read_object(path / TOKENIZER_CONFIG).get("chat_template", other)
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        rows = [row for row in value if isinstance(row, dict)]
        return {str(row.get("name")): row.get("template", "") for row in rows}
    return dict(value) if value is other and isinstance(value, Mapping) else {}


def _end_tokens(mending: _Mending) -> tuple[int, ...]:
    """Ids at which an answer ends, by config and generation config."""
    index = mending.index
    generation = read_object(index.path / GENERATION_CONFIG)
    parts = [index.config, *(index.config.get(name) or {} for name in TEXT_PARTS)]
    found = [
        n for p in parts for n in token_ids("config.json", "eos_token_id", p.get("eos_token_id"))
    ]
    found += token_ids(GENERATION_CONFIG, "eos_token_id", generation.get("eos_token_id"))
    size = embedding_rows(index) or text_config(index.config).get("vocab_size") or 0
    ends = list(dict.fromkeys(n for n in found if n >= 0 and (not size or n < size)))
    if lost := sorted({n for n in found if n >= 0} - set(ends)):
        mending.notes.append(
            f"end token(s) {', '.join(map(str, lost))} are not in the vocabulary of {size:,} "
            "tokens and were passed over"
        )
    if len(ends) > 1:
        mending.notes.append(
            f"answers end at any of the tokens {', '.join(map(str, ends))}; all are in the GGUF"
        )
    return tuple(ends)


def _mend_byte_order_marks(mending: _Mending) -> None:
    """The converter reads JSON as UTF-8 without a mark in front."""
    for name in ("config.json", GENERATION_CONFIG, TOKENIZER_CONFIG):
        path = mending.index.path / name
        if path.is_file() and path.read_bytes()[:3] == BOM_UTF8:
            mending.edit(name)
            mending.notes.append(f"{name} begins with a byte order mark, which was left out")


_MENDS: tuple[Callable[[_Mending], None], ...] = (
    _mend_byte_order_marks,
    _mend_shard_index,
    _mend_quantization,
    _mend_names,
    _mend_tied_head,
    _mend_surplus_tokens,
    _mend_token_texts,
    _mend_templates,
)
