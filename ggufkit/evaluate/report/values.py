"""The values of a report: plain facts, from which both renderings are made."""

from dataclasses import dataclass
from pathlib import Path

from ggufkit.evaluate.leaks import Calibrated
from ggufkit.values import Comparison, EvalResult, GGUFFile, RunManifest, SpeedResult, TaskResult


@dataclass(frozen=True)
class ModelFile:
    """A GGUF that results may belong to.

    Attributes:
        path: the file.
        digest: its SHA-256.
        header: what its header says; None if it could not be read.
        manifest: how it was made, if that is known.
        spec: what to type to name it.
        calibrated: on what; None if that is not known.
    """

    path: Path
    digest: str
    header: GGUFFile | None
    manifest: RunManifest | None
    spec: str
    calibrated: tuple[Calibrated, ...] | None = None


@dataclass(frozen=True)
class TypeRow:
    """Tensors of one role through all blocks.

    Attributes:
        role: such as ``attn_q``.
        types: ggml type by block, in the order of the map's blocks; empty where
            a block has no such tensor.
    """

    role: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class TypePart:
    """What one ggml type has of a file: tensors, elements, bytes."""

    type: str
    tensors: int
    parameters: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight of the type."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class TypeMap:
    """Which type each matrix of a file has.

    Attributes:
        blocks: numbers of the blocks.
        rows: one for each role that has matrices in blocks.
        others: matrices outside of blocks, by name.
        vectors: tensors of one dimension (norms, biases), which are in no row.
        parts: what each type has of the whole file, fewest bits first.
    """

    blocks: tuple[int, ...]
    rows: tuple[TypeRow, ...]
    others: dict[str, str]
    vectors: int
    parts: tuple[TypePart, ...]


@dataclass(frozen=True)
class Provenance:
    """Where a file came from and how it was made.

    Attributes:
        sha256: of the file.
        origin: such as ``hf:ORG/NAME@REVISION``; empty if that is not known.
        source: the model's own names and license, from the file's metadata.
        calibrated: on what; None if that is not known.
        llama_cpp: commit that made the file; empty if that is not known.
        created: UTC time of making, ISO 8601; empty if that is not known.
        command: what to type to make it again; empty if that is not known.
        verified: what came of comparing it with its checkpoint; empty if that is not known.
    """

    sha256: str
    origin: str = ""
    source: str = ""
    calibrated: tuple[Calibrated, ...] | None = None
    llama_cpp: str = ""
    created: str = ""
    command: str = ""
    verified: str = ""


@dataclass(frozen=True)
class Entry:
    """One model of a study and all that is known of it.

    Attributes:
        name: file name without its ending.
        label: the part of the name that tells it from the others.
        file: file name.
        spec: what to type to name it.
        nbytes: size of the file.
        bits_per_weight: over all tensors; None if the file is not at hand.
        comparison: beside the reference on the study's text.
        perplexity: llama-perplexity's number on the same chunks.
        texts: the comparisons (or perplexities) on further texts, by name.
        generation: decoding speed in the study's setting.
        prompt: reading speed in the study's setting.
        tasks: by name of the task.
        on_size_front: no other file is both smaller and closer to the reference.
        on_speed_front: no other file is both faster and closer to the reference.
        types: its map of types; None if the file is not at hand.
        provenance: where it came from.
    """

    name: str
    label: str
    file: str
    spec: str
    nbytes: int
    bits_per_weight: float | None
    comparison: Comparison | None
    perplexity: EvalResult | None
    texts: dict[str, Comparison | EvalResult]
    generation: SpeedResult | None
    prompt: SpeedResult | None
    tasks: dict[str, TaskResult]
    types: TypeMap | None
    provenance: Provenance
    on_size_front: bool = False
    on_speed_front: bool = False

    @property
    def cost(self) -> float:
        """What is drawn as quality, less being better: KL divergence, or perplexity."""
        if self.comparison:
            return self.comparison.divergence
        assert self.perplexity, "a reference has no cost"
        return self.perplexity.perplexity

    @property
    def cost_error(self) -> float:
        """Its standard error."""
        if self.comparison:
            return self.comparison.divergence_error
        assert self.perplexity, "a reference has no cost"
        return self.perplexity.error


@dataclass(frozen=True)
class Alternative:
    """Another file, for who wants something else: what it is for, which, and what it takes."""

    wish: str
    file: str
    why: str


@dataclass(frozen=True)
class Recommendation:
    """Which file to take, in words.

    Attributes:
        file: name of the file; empty if none can be recommended.
        certainty: ``shown`` (the intervals say so), ``estimated`` (the figures
            say so, their intervals do not yet), ``closest`` (no file is good
            enough; this one is nearest) or ``none``.
        headline: one sentence.
        sha256: of the file, as two files may have one name; empty if there is none.
        reasons: why, and what was traded.
        cautions: what to keep in mind.
        alternatives: other files for other wishes.
        commands: what to type to know more.
    """

    file: str
    certainty: str
    headline: str
    sha256: str = ""
    reasons: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Models that can be compared: same text, context, chunks and reference.

    Attributes:
        title: what the models have in common.
        measure: ``divergence`` if there is a reference, else ``perplexity``.
        text: name of the text.
        text_spec: what to type to name it; empty if that is not known.
        text_digest: SHA-256 of the text.
        context: tokens per chunk.
        chunks: number of chunks.
        reference: the reference, or None.
        entries: the models (without the reference), the smallest file first.
        generation_setting: in words; empty if there are no speeds.
        prompt_setting: the same.
        machines: where speeds were measured.
        llama_cpp: commits of the tools that measured.
        measured: UTC times of the first and the last result, ISO 8601.
        command: what to type to measure again.
        recommendation: which file to take.
    """

    title: str
    measure: str
    text: str
    text_spec: str
    text_digest: str
    context: int
    chunks: int
    reference: Entry | None
    entries: tuple[Entry, ...]
    generation_setting: str
    prompt_setting: str
    machines: tuple[str, ...]
    llama_cpp: tuple[str, ...]
    measured: tuple[str, str]
    command: str
    recommendation: Recommendation

    def is_chosen(self, entry: Entry) -> bool:
        """Whether a model is the recommended one."""
        return entry.provenance.sha256 == self.recommendation.sha256


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        studies: the largest first.
        left_out: stored results that are in no plot, and why.
        tolerance: share of perplexity that a recommended file may cost.
        version: of ggufkit.
        machine: where the report was made.
        created: UTC time, ISO 8601.
    """

    studies: tuple[Study, ...]
    left_out: tuple[str, ...]
    tolerance: float
    version: str
    machine: str
    created: str


@dataclass(frozen=True)
class WrittenReport:
    """A report on disk: the page, its Markdown twin, and the values in both."""

    page: Path
    markdown: Path
    report: Report
