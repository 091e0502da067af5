"""What the metadata of a GGUF says, by name instead of by key.

Keys as in llama.cpp's ``llama-arch.cpp``; those of an architecture begin with
its name, such as ``llama.context_length``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ggufkit.llamacpp.converter import STOP_TOKENS
from ggufkit.progress import Progress
from ggufkit.values import GGUFFile, Json

SPECIAL_TOKENS = (
    *("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask"),
    *("fim_pre", "fim_suf", "fim_mid"),
)
"""Names of special tokens in ``tokenizer.ggml.NAME_token_id``; the format spells
the separator this way."""

END_NAMES = (
    *("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "<turn|>"),
    *("<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
    *("<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
)
"""Tokens that llama.cpp takes for the end of an answer by their text alone
(``llama_vocab::impl::load``, src/llama-vocab.cpp)."""
_FURTHER_END_NAMES = ("<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>")
"""Ends of turns (Command R, OpenChat) that it knows only where the file names them."""
_PRE_WITH_BOS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"),
    *("midm-2.0", "lfm2", "jina-v5-nano", "tekken", "chameleon"),
)
"""Pre-tokenizers for which ``llama_vocab::impl::load`` sets ``add_bos``."""
_CONTROL = 3
"""``LLAMA_TOKEN_TYPE_CONTROL``."""

_SAMPLING_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "penalty_repeat",
}


@dataclass(frozen=True)
class Metadata:
    """A look at a GGUF's metadata.

    Attributes:
        gguf: the file's header, read with its arrays.
    """

    gguf: GGUFFile

    def get(self, key: str) -> Json:
        """The value of a key, or None."""
        return self.gguf.metadata.get(key)

    @property
    def architecture(self) -> str:
        """Such as ``llama``; empty if the file does not say."""
        return str(self.get("general.architecture") or "")

    def of_architecture(self, key: str) -> Json:
        """The value of one of the architecture's own keys, or None."""
        return self.get(f"{self.architecture}.{key}")

    @property
    def trained_context(self) -> int | None:
        """Tokens of context that the model was trained with."""
        value = self.of_architecture("context_length")
        return int(value) if isinstance(value, int) else None

    @property
    def tokens(self) -> list[str]:
        """The vocabulary; empty if it was passed over or there is none."""
        value = self.get("tokenizer.ggml.tokens")
        return value if isinstance(value, list) else []

    @property
    def special_tokens(self) -> dict[str, tuple[int, str]]:
        """Name to id and text of each special token that is set."""
        found = {}
        for name in SPECIAL_TOKENS:
            number = self.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(number, int):
                known = 0 <= number < len(self.tokens)
                found[name] = (number, self.tokens[number] if known else "")
        return found

    def special(self, name: str) -> str:
        """Text of a special token; empty if it is not set."""
        return self.special_tokens.get(name, (0, ""))[1]

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """End tokens that llama.cpp has no key for; ggufkit keeps them in one of its own."""
        value = self.get(STOP_TOKENS)
        numbers = value if isinstance(value, list) else []
        return frozenset(n for n in numbers if isinstance(n, int) and n >= 0)

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Tokens that end an answer: those set as such, and well-known control tokens.

        As in llama.cpp, ``<|end|>`` is none where ``<|return|>`` and ``<|call|>`` are
        (gpt-oss ends its reasoning with it), nor where ``<|calls|>`` and ``<|flush|>``
        are; ``</s>`` is none beside ``<|tool_response>`` or ``<|plamo:eos|>``. Those
        that end an infill alone, such as ``<|file_sep|>``, are left out.
        """
        own = [self.special(name) for name in ("eos", "eot", "eom")]
        own += [self.tokens[n] for n in sorted(self.stop_token_ids) if n < len(self.tokens)]
        kinds = self.get("tokenizer.ggml.token_type") or []
        control = {t for t, kind in zip(self.tokens, kinds, strict=False) if kind == _CONTROL}
        known = [t for t in (*END_NAMES, *_FURTHER_END_NAMES) if t in control]
        ends = dict.fromkeys(t for t in (*own, *known) if t)
        there = {name for name in END_NAMES if name in self.tokens}
        calls = {"<|call|>", "<|calls|>"} & there
        if calls and {"<|return|>", "<|flush|>"} & there:
            ends.pop("<|end|>", None)
        if "<|tool_response>" in there or "<|plamo:eos|>" in own:
            ends.pop("</s>", None)
        return tuple(ends)

    @property
    def chat_template(self) -> str:
        """The model's Jinja chat template; empty if it has none."""
        return str(self.get("tokenizer.chat_template") or "")

    @property
    def named_templates(self) -> dict[str, str]:
        """The model's further chat templates by name, such as ``tool_use``."""
        prefix = "tokenizer.chat_template."
        found = ((k, v) for k, v in self.gguf.metadata.items() if k.startswith(prefix))
        return {k.removeprefix(prefix): v for k, v in sorted(found) if isinstance(v, str)}

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts the BOS token first."""
        value = self.get("tokenizer.ggml.add_bos_token")
        if isinstance(value, bool):
            return value
        # What llama.cpp takes for granted when the file does not say.
        kind, pre = self.get("tokenizer.ggml.model"), self.get("tokenizer.ggml.pre")
        return kind in ("llama", "bert") or pre in _PRE_WITH_BOS

    @property
    def lacks_pre_tokenizer(self) -> bool:
        """Whether a byte-level BPE does not say how text is split before merging.

        llama.cpp then splits as GPT-2 did, which gives most models other tokens than
        they were trained on. Converters of before May 2024 wrote such files.
        """
        return self.get("tokenizer.ggml.model") == "gpt2" and not self.get("tokenizer.ggml.pre")

    @property
    def sampling(self) -> dict[str, float]:
        """Sampling parameters that the model recommends, by ggufkit's names."""
        given = {name: self.get(f"general.sampling.{key}") for name, key in _SAMPLING_KEYS.items()}
        return {name: value for name, value in given.items() if value is not None}


def warn_of_vocabulary(gguf: GGUFFile, progress: Progress) -> None:
    """Tell that a file's vocabulary is not whole, before something is made with it."""
    if Metadata(gguf).lacks_pre_tokenizer:
        progress.warn(
            f"{gguf.path.name} has no pre-tokenizer (tokenizer.ggml.pre): llama.cpp splits text "
            "as GPT-2 did, so tokens, perplexity and answers may be off; convert the checkpoint "
            "again"
        )


def split_parts(gguf: GGUFFile) -> tuple[Path, ...]:
    """All parts of a model that llama-gguf-split cut up, this one included.

    A file that is whole gives itself alone. A part whose name does not follow
    the tool's ``NAME-00001-of-00003.gguf`` gives itself alone as well; see
    :func:`split_count`.
    """
    count = split_count(gguf)
    named = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", gguf.path.name)
    if count < 2 or not named:
        return (gguf.path,)
    names = (f"{named[1]}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1))
    return tuple(gguf.path.with_name(name) for name in names)


def split_count(gguf: GGUFFile) -> int:
    """Number of parts that the file says its model has; 1 for a whole one."""
    count = gguf.metadata.get("split.count")
    return max(1, count) if isinstance(count, int) else 1
