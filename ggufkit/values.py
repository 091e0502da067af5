"""The frozen values that stages take and give.

They hold facts and no behaviour beyond looking at those facts; all of them
turn into JSON with :func:`to_json`.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufkit.errors import UsageError

Json = Any
"""A value that :mod:`json` can write."""


def to_json(value: Any) -> Json:
    """Turn values (dataclasses, paths, tuples, mappings) into plain JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint on disk.

    Attributes:
        path: the directory with config, tokenizer and safetensors shards.
        name: short name for files, such as ``SmolLM2-135M-Instruct``.
        origin: where it came from, such as ``hf:ORG/NAME@REVISION``.
        digest: SHA-256 over the sorted names and digests of its files.
        notes: things every later report must say, such as ``dequantized source``.
    """

    path: Path
    name: str
    origin: str
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileDigest:
    """SHA-256 (hex) and size of one file."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class RunManifest:
    """What a stage did: written last, beside its outputs.

    Attributes:
        stage: name of the stage, such as ``quantize``.
        version: the stage's own version; raised when its output changes.
        key: hex key over stage, version, inputs, options and tool.
        model: name of the model that it belongs to.
        inputs: digests of what went in, by role.
        options: every option that can change the output.
        tool: identity of the tools and libraries used.
        outputs: relative file name to digest and size.
        facts: what came out: numbers to report, measured at the time.
        created: UTC time, ISO 8601.
        seconds: how long the work took.
    """

    stage: str
    version: int
    key: str
    model: str
    inputs: dict[str, Json]
    options: dict[str, Json]
    tool: dict[str, Json]
    outputs: dict[str, FileDigest]
    facts: dict[str, Json]
    created: str
    seconds: float


@dataclass(frozen=True)
class Artifact:
    """The published directory of a stage and its manifest.

    ``reused`` is true if it was there already and its outputs still hash right.
    """

    path: Path
    manifest: RunManifest
    reused: bool

    def file(self, suffix: str = "") -> Path:
        """The only output whose name ends with ``suffix``."""
        names = [n for n in self.manifest.outputs if n.endswith(suffix)]
        if len(names) != 1:
            raise LookupError(f"{self.path} has {len(names)} outputs that end with '{suffix}'")
        return self.path / names[0]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF: shape in GGUF order (columns first), type, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class GGUFFile:
    """What the header of a GGUF says.

    Attributes:
        path: the file.
        version: GGUF version.
        nbytes: size of the file.
        metadata: keys and values; long arrays (tokens, merges) as lists.
        tensors: in file order; ``offset`` counts from the start of the file.
    """

    path: Path
    version: int
    nbytes: int
    metadata: dict[str, Json]
    tensors: tuple[TensorInfo, ...]

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(t.parameters for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per element, over all tensors."""
        return 8 * sum(t.nbytes for t in self.tensors) / max(1, self.parameters)

    @property
    def matrix_type(self) -> str:
        """The type of most elements, such as ``BF16``; empty without tensors."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.parameters
        return counts.most_common(1)[0][0] if counts else ""


GGML_ROUNDING = "ggml"
"""llama-quantize's own rounding."""


@dataclass(frozen=True)
class QuantizeResult:
    """One quantized file: what was asked for and what was got.

    Attributes:
        path: the GGUF.
        type: quantization type asked for, such as ``Q4_K_M``.
        awq: whether AWQ scales were folded in.
        imatrix: whether it was quantized with an importance matrix.
        rounding: ``ggml`` for llama-quantize's own, ``GPTQ`` or ``refined GPTQ``.
        bits_per_weight_asked: what the type promises when every tensor can have it.
        bits_per_weight: what the file has, over all its tensors.
        fallbacks: type that tensors fell back to, and how many did.
        tensors: number of tensors in the file.
        nbytes: size of the file.
        seconds: time of the work (of the original run when reused).
        reused: whether it was there already.
        notes: remarks to show beside it.
    """

    path: Path
    type: str
    awq: bool
    imatrix: bool
    bits_per_weight_asked: float
    bits_per_weight: float
    fallbacks: dict[str, int]
    tensors: int
    nbytes: int
    seconds: float
    reused: bool
    notes: tuple[str, ...] = ()
    rounding: str = GGML_ROUNDING

    @property
    def label(self) -> str:
        """Type and ways in words, such as ``Q4_0 with AWQ and imatrix``."""
        return label_of(self.type, awq=self.awq, rounding=self.rounding, imatrix=self.imatrix)


def rounding_of(facts: Mapping[str, Json]) -> str:
    """How a file's weights were rounded, from the facts of the stage that wrote it."""
    return str((facts.get("rounding") or {}).get("label", GGML_ROUNDING))


def label_of(type: str, *, awq: bool, rounding: str, imatrix: bool) -> str:
    """Type and ways in words, such as ``Q4_0 with AWQ and imatrix``.

    Args:
        type: quantization type.
        awq: whether AWQ scales were folded in.
        rounding: as :class:`QuantizeResult` has it.
        imatrix: whether an importance matrix was used.
    """
    told = (("AWQ", awq), (rounding, rounding != GGML_ROUNDING), ("imatrix", imatrix))
    ways = [way for way, used in told if used]
    return f"{type} with {' and '.join(ways)}" if ways else type


@dataclass(frozen=True)
class Text:
    """A text to calibrate on or to measure with.

    Attributes:
        name: what the user asked for, such as ``wikitext``.
        digest: SHA-256 of its UTF-8 bytes.
        path: a UTF-8 file that holds it.
        nbytes: its size.
        source: where it came from, in words.
    """

    name: str
    digest: str
    path: Path
    nbytes: int
    source: str


@dataclass(frozen=True)
class EvalResult:
    """Perplexity of one model on one text.

    Attributes:
        model: path of the GGUF.
        text: name of the text.
        perplexity: llama-perplexity's final estimate.
        error: its standard error, same unit.
        tokens: tokens of the text that were read.
        chunks: number of contexts scored.
        context: tokens per chunk.
        tokens_per_second: read tokens over the time of the whole pass.
        peak_rss_nbytes: peak resident memory of the tool.
        file_nbytes: size of the model's file.
        seconds: wall time of the tool.
        reused: whether the stored result of an earlier run was used.
        overlap: share of the text that a calibration text of the model holds too; None
            if it has none, or that is not known.
        notes: what is to be known of the figures, such as an overlap that was allowed.
    """

    model: Path
    text: str
    perplexity: float
    error: float
    tokens: int
    chunks: int
    context: int
    tokens_per_second: float
    peak_rss_nbytes: int
    file_nbytes: int
    seconds: float
    reused: bool = False
    overlap: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What two models differ by on the same chunks, and whether that is real.

    Attributes:
        measure: ``log_perplexity`` (nats per token), ``divergence`` (mean KL
            divergence from the reference, nats per token) or ``bits_per_byte``.
            Less is better in all of them.
        model: the model judged.
        other: the model that it is judged against.
        difference: ``model`` minus ``other``.
        low: lower end of the confidence interval of the difference.
        high: its upper end.
        confidence: of the interval, such as 0.95.
        chunks: number of chunks that both read.
        seed: of the bootstrap.
        verdict: what is said of ``model``: ``better``, ``worse`` or
            ``indistinguishable``.
        chunks_to_decide: chunks in all after which a difference of this size would be
            told from none, four times out of five; None if the verdict is clear, or
            no text would do (the difference is 0, or next to nothing).
    """

    measure: str
    model: Path
    other: Path
    difference: float
    low: float
    high: float
    confidence: float
    chunks: int
    seed: int
    verdict: str
    chunks_to_decide: int | None = None


@dataclass(frozen=True)
class Comparison:
    """One candidate beside the reference on one text, both having read the same chunks.

    Logarithms are natural, and unless said otherwise a figure is a mean over the
    scored tokens (the last half of each chunk), with the standard error of that
    mean. Percentiles go from a percentage as a string (``"0.1"``, ``"50"``,
    ``"99.9"``, ``"100"`` for the largest) to a value.

    Attributes:
        model: the candidate's GGUF.
        reference: the reference's GGUF.
        text: name of the text.
        context: tokens per chunk.
        chunks: number of chunks.
        tokens: scored tokens.
        log_perplexity: mean negative log probability of the text by the candidate.
        log_perplexity_error: its standard error.
        reference_log_perplexity: the same by the reference.
        delta_log_perplexity: candidate minus reference.
        delta_log_perplexity_error: standard error of the paired difference.
        divergence: mean KL divergence of the candidate from the reference, nats per token.
        divergence_error: its standard error.
        divergence_percentiles: over tokens.
        agreement: share of tokens for which both have the same likeliest token.
        agreement_error: its standard error.
        delta_p_mean: mean difference of the probability of the text's token.
        delta_p_rms: root mean square of that difference.
        delta_p_percentiles: over tokens.
        bits_per_byte: of the scored part of the text, by the candidate.
        reference_bits_per_byte: the same by the reference.
        file_nbytes: size of the candidate's file.
        reference_file_nbytes: size of the reference's file.
        verdicts: the candidate against the reference.
        seconds: wall time of the candidate's own part.
        computed_chunks: chunks computed now; the rest was there already.
        reused: whether nothing at all had to be computed.
        overlap: share of the text that a calibration text of the candidate holds too;
            None if it has none, or that is not known.
        notes: what is to be known of the figures, such as an overlap that was allowed.
        divergence_shortfall: None if the divergence is exact. If the reference came out
            of a compact cache, divergences are lower bounds, and this is by how large a
            share the mean was too low when the cache was written (the largest share
            of the models that were compared then); all else is exact.
    """

    model: Path
    reference: Path
    text: str
    context: int
    chunks: int
    tokens: int
    log_perplexity: float
    log_perplexity_error: float
    reference_log_perplexity: float
    delta_log_perplexity: float
    delta_log_perplexity_error: float
    divergence: float
    divergence_error: float
    divergence_percentiles: dict[str, float]
    agreement: float
    agreement_error: float
    delta_p_mean: float
    delta_p_rms: float
    delta_p_percentiles: dict[str, float]
    bits_per_byte: float
    reference_bits_per_byte: float
    file_nbytes: int
    reference_file_nbytes: int
    verdicts: tuple[Difference, ...] = ()
    seconds: float = 0.0
    computed_chunks: int = 0
    reused: bool = False
    overlap: float | None = None
    notes: tuple[str, ...] = ()
    divergence_shortfall: float | None = None


@dataclass(frozen=True)
class BytesComparison:
    """Two models with different vocabularies on one text.

    Their predictions are of different tokens, so all that can be compared is what
    the same bytes of the text cost. Both read the same parts of it, which end where
    both have the end of a token, and of each part the same second half is scored.

    Attributes:
        model: the candidate's GGUF.
        reference: the reference's GGUF.
        text: name of the text.
        context: tokens per chunk at most.
        chunks: number of chunks.
        nbytes: bytes scored.
        bits_per_byte: by the candidate.
        reference_bits_per_byte: by the reference.
        vocabulary_difference: in what the vocabularies differ, in words.
        file_nbytes: size of the candidate's file.
        reference_file_nbytes: size of the reference's file.
        verdicts: the candidate against the reference.
        seconds: wall time.
        reused: whether nothing had to be computed.
    """

    model: Path
    reference: Path
    text: str
    context: int
    chunks: int
    nbytes: int
    bits_per_byte: float
    reference_bits_per_byte: float
    vocabulary_difference: str
    file_nbytes: int
    reference_file_nbytes: int
    verdicts: tuple[Difference, ...] = ()
    seconds: float = 0.0
    reused: bool = False


@dataclass(frozen=True)
class PairDifference:
    """A difference of two candidates on one text."""

    text: str
    difference: Difference


@dataclass(frozen=True)
class ComparisonReport:
    """What ``compare`` found.

    Attributes:
        comparisons: each candidate beside the reference, text by text.
        by_bytes: those whose vocabulary is not the reference's.
        differences: of each pair of candidates, text by text.
        notes: remarks to show beside them.
    """

    comparisons: tuple[Comparison, ...]
    by_bytes: tuple[BytesComparison, ...] = ()
    differences: tuple[PairDifference, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpeedResult:
    """How fast one model is in one setting, by llama-bench.

    Attributes:
        model: the GGUF.
        work: ``prompt`` (tokens read at once) or ``generation`` (one by one).
        tokens: tokens read or generated.
        depth: tokens that were in the context before.
        threads: CPU threads.
        batch: tokens per logical batch.
        ubatch: tokens per physical batch.
        flash_attention: whether it was on.
        gpu_layers: layers on a GPU.
        tokens_per_second: mean over the repetitions.
        tokens_per_second_deviation: their standard deviation.
        peak_rss_nbytes: peak resident memory of the run that this setting had to itself.
        file_nbytes: size of the model's file.
        bandwidth: bytes per second that the machine's memory gave to as many
            threads, measured beside it; None if it was not.
        bandwidth_share: for generation, bytes of weights and of the KV cache read per
            second over ``bandwidth``; else None.
        machine: the CPU's name.
        reused: whether the stored result of an earlier run was used.
    """

    model: Path
    work: str
    tokens: int
    depth: int
    threads: int
    batch: int
    ubatch: int
    flash_attention: bool
    gpu_layers: int
    tokens_per_second: float
    tokens_per_second_deviation: float
    peak_rss_nbytes: int
    file_nbytes: int
    bandwidth: float | None
    bandwidth_share: float | None
    machine: str
    reused: bool = False


@dataclass(frozen=True)
class TaskResult:
    """How many questions of a task one model answers rightly, by llama-perplexity.

    Attributes:
        model: the GGUF.
        task: such as ``hellaswag``.
        data: name of the file of questions.
        questions: how many were asked.
        score: share answered rightly, 0 to 1.
        low: lower end of the 95 % interval of that share.
        high: its upper end.
        chance: the share that guessing would give, if known.
        file_nbytes: size of the model's file.
        seconds: wall time of the tool.
        reused: whether the stored result of an earlier run was used.
    """

    model: Path
    task: str
    data: str
    questions: int
    score: float
    low: float
    high: float
    chance: float | None
    file_nbytes: int
    seconds: float
    reused: bool = False


@dataclass(frozen=True)
class TaskDifference:
    """What two models differ by on the same questions, and whether that is real.

    Attributes:
        task: such as ``hellaswag``.
        model: the model judged.
        other: the model that it is judged against.
        questions: how many both were asked.
        only_model: questions that only ``model`` answers rightly.
        only_other: questions that only ``other`` answers rightly.
        p_value: of McNemar's exact test: how likely counts at least as unequal would
            be if both models were equally good.
        verdict: what is said of ``model``: ``better`` or ``worse`` if ``p_value`` is
            below 0.05, else ``indistinguishable``.
    """

    task: str
    model: Path
    other: Path
    questions: int
    only_model: int
    only_other: int
    p_value: float
    verdict: str


@dataclass(frozen=True)
class QuantRecipe:
    """How a GGUF is quantized: everything that changes the bytes written.

    Attributes:
        type: quantization type in llama-quantize's spelling.
        tensor_types: exact tensor name to ggml type, overriding the mixture.
        imatrix: digest of the importance matrix, or empty.
    """

    type: str
    tensor_types: dict[str, str] = field(default_factory=dict)
    imatrix: str = ""


@dataclass(frozen=True)
class FetchOptions:
    """How a model is found and fetched.

    Attributes:
        hub: hub of a bare ``ORG/NAME``; None for the environment's setting.
        revision: branch, tag or commit.
        trust_remote_code: run Python code that the checkpoint brings.
        allow_pickle: unpickle ``.bin`` weights if there are no others.
    """

    hub: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class VerifyOptions:
    """Whether a GGUF is compared with its checkpoint before it is published.

    Attributes:
        enabled: compare; else only see that llama.cpp opens what is published.
        allowed: names of differences that are no errors.
    """

    enabled: bool = True
    allowed: tuple[str, ...] = ()

    @property
    def key(self) -> dict[str, Json]:
        """What a stage's key has of it: nothing where nothing is left out."""
        if not self.enabled:
            return {"verify": False}
        return {"allow_difference": sorted(self.allowed)} if self.allowed else {}


def verification_in_words(facts: Mapping[str, Json]) -> str:
    """What a manifest's facts say of the comparison with the checkpoint, in one line.

    Returns:
        Empty where nothing is known, as for files of other origin.
    """
    found = facts.get("verification")
    if not found:
        return ""
    if found == "skipped":
        return "not compared with its checkpoint (--no-verify)"
    figures, mismatches = found["figures"], found["mismatches"]
    names = ", ".join(f"{m['name']} ({'allowed' if m['error'] else 'warning'})" for m in mismatches)
    words = f"differs in {names}" if names else "same as the checkpoint"
    if found["not_compared"] and not names:
        words = "what was compared is the same as in the checkpoint"
    if "kl_mean" in figures:
        count = f"{figures['positions']:.0f} predictions"
        words += f"; KL {figures['kl_mean']:.1e} on {count} of the float GGUF"
    if found["not_compared"]:
        words += "; not compared: " + "; ".join(found["not_compared"])[:200]
    return words


@dataclass(frozen=True)
class Calibration:
    """What AWQ and the importance matrix look at.

    Attributes:
        text: name or file of the calibration text.
        samples: sequences taken from it.
        length: tokens of each.
        column: the text's column, if the file has several.
        seed: of the choice of sequences; None to spread them evenly.
    """

    text: str = "stdlib-docstrings"
    samples: int = 16
    length: int = 512
    column: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be cut.

        Raises:
            UsageError: if a number is too small.
        """
        if self.samples < 1 or self.length < 8:
            raise UsageError("calibration needs at least 1 sample of at least 8 tokens")


@dataclass(frozen=True)
class AwqOptions:
    """How scales are found and kept.

    Attributes:
        backend: ``ggufkit``, or ``autoawq`` for AutoAWQ's own search.
        dtype: what changed tensors are stored in. ``keep``: their own dtype; if
            that has 16 bits, scales are powers of two, which lose nothing there.
            ``f16`` or ``f32``: any scales. ``auto``: ``keep``, but ``f16`` for
            what is only converted and has 16 bits; BF16's 8 significant bits
            would show, F16's 11 do not.
        sensitivity: let each token count by the squared gradient of the loss.
        clip: clip weights too where that lowers the objective; this changes the
            function.
        scales: a scales file to fold in, instead of searching.
    """

    backend: str = "ggufkit"
    dtype: str = "auto"
    sensitivity: bool = False
    clip: bool = False
    scales: Path | None = None


@dataclass(frozen=True)
class RoundingOptions:
    """How weights are rounded onto the grid of their type.

    Attributes:
        method: ``ggml`` as llama-quantize does it, or ``gptq`` with error feedback.
        refine: then learn block scales on the divergence from the original model.
    """

    method: str = GGML_ROUNDING
    refine: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UsageError: if there would be nothing to refine.
        """
        if self.refine and self.method == GGML_ROUNDING:
            raise UsageError("--refine goes on where GPTQ ends", "Add --rounding gptq")

    @property
    def label(self) -> str:
        """In words."""
        return f"refined {self.method.upper()}" if self.refine else self.method.upper()

    @property
    def suffix(self) -> str:
        """What a file's name says of it."""
        if self.method == GGML_ROUNDING:
            return ""
        return f"-{self.method}" + "-refined" * self.refine


FLASH_ATTENTION = ("auto", "on", "off")
"""What flash attention can be set to; ``auto`` is on where the backend can do it."""


@dataclass(frozen=True)
class BenchOptions:
    """What ``bench`` measures: every combination of these, each in a run of its own.

    Attributes:
        prompt: numbers of tokens read at once; empty for none.
        generation: numbers of tokens generated one by one; empty for none.
        depth: tokens that are in the context before.
        threads: CPU threads; empty for as many as there are physical cores.
        batch: tokens per logical batch.
        ubatch: tokens per physical batch, at most ``batch``.
        flash_attention: of ``FLASH_ATTENTION``.
        gpu_layers: layers on a GPU, -1 for all; empty for all if there is a GPU.
        repetitions: measurements of each, after a warm-up.
        sweep: also vary threads, depth, ubatch, flash attention and GPU layers, one at
            a time.
    """

    prompt: tuple[int, ...] = (512,)
    generation: tuple[int, ...] = (128,)
    depth: tuple[int, ...] = (0,)
    threads: tuple[int, ...] = ()
    batch: tuple[int, ...] = (2048,)
    ubatch: tuple[int, ...] = (512,)
    flash_attention: tuple[str, ...] = FLASH_ATTENTION[:1]
    gpu_layers: tuple[int, ...] = ()
    repetitions: int = 5
    sweep: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UsageError: if a number is too small, or nothing is to be measured.
        """
        positive = (*self.prompt, *self.generation, *self.threads, *self.batch, *self.ubatch)
        if min((*positive, self.repetitions), default=1) < 1:
            raise UsageError("tokens, threads, batches and repetitions are at least 1")
        if min(self.depth, default=0) < 0 or min(self.gpu_layers, default=0) < -1:
            raise UsageError("a depth is at least 0; GPU layers are at least 0, or -1 for all")
        if not (self.prompt or self.generation):
            raise UsageError("there is nothing to measure", "Name tokens with -p or -n")
        if not all((self.depth, self.batch, self.ubatch, self.flash_attention)):
            raise UsageError("depth, batches and flash attention need at least one value each")
        if unknown := set(self.flash_attention) - set(FLASH_ATTENTION):
            raise UsageError(f"flash attention cannot be '{min(unknown)}'")


@dataclass(frozen=True)
class AwqResult:
    """A checkpoint with scales folded in, and what the search was worth.

    Attributes:
        path: directory of the checkpoint.
        scales: the scales alone.
        type: the quantization type that they were searched for.
        calibration: name of the calibration text.
        tokens: calibration tokens used.
        groups: sets of scales searched.
        groups_left_alone: sets for which identity was best.
        objective_ratio: squared error of the outputs with scales, relative to
            that without; summed over all groups. None if nothing was searched.
        rows_clipped: rows of weights that were clipped.
        divergence: mean KL divergence of the folded model from the original on
            held-back text, nats per token, in float32.
        seconds: time of the search (of the original run when reused).
        reused: whether the scales were there already.
    """

    path: Path
    scales: Path
    type: str
    calibration: str
    tokens: int
    groups: int
    groups_left_alone: int
    objective_ratio: float | None
    rows_clipped: int
    divergence: float
    seconds: float
    reused: bool


@dataclass(frozen=True)
class DemoResult:
    """What ``demo`` made and measured.

    Attributes:
        files: F32, plain Q4_0, Q4_0 with AWQ, and with AWQ and imatrix.
        measured: their perplexities, in the same order.
        recovered: for the last two, the share of the loss of plain Q4_0 that is
            won back, 0 to 1; perplexity differences, on a text that AWQ has not
            seen.
        calibration: name of the text that AWQ looked at.
        question: what the last model was asked.
        answer: what it said.
        modelfile: the Ollama Modelfile for it.
    """

    files: tuple[QuantizeResult, ...]
    measured: tuple[EvalResult, ...]
    recovered: tuple[float, ...]
    calibration: str
    question: str
    answer: str
    modelfile: Path
