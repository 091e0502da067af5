"""One checkpoint on its way to GGUFs: its stages, with what they share.

The rooms do not know each other; here their values meet. Only the pipeline
uses this.
"""

import dataclasses
import hashlib
import os
import re
import shutil
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Literal

from ggufkit import settings
from ggufkit.checkpoint.config import suspicious_keys
from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.checkpoint.prepare import Prepared, prepare_checkpoint
from ggufkit.errors import CheckpointError
from ggufkit.evaluate import leaks, perplexity
from ggufkit.llamacpp.observing import check_opens
from ggufkit.llamacpp.toolchain import Converter, NativeBuild
from ggufkit.progress import Progress
from ggufkit.quantize import stages
from ggufkit.quantize.coverage import check_against_checkpoint
from ggufkit.quantize.imatrix import read_imatrix
from ggufkit.quantize.stages import PlannedTensor
from ggufkit.quantize.types import is_float, require_importance, space_forecast
from ggufkit.scaling.families import Family, family_of
from ggufkit.store import Store, canonical_json, require_space
from ggufkit.texts import load as texts
from ggufkit.values import (
    Artifact,
    AwqOptions,
    Calibration,
    Checkpoint,
    EvalResult,
    FetchOptions,
    Json,
    QuantRecipe,
    RoundingOptions,
    Text,
    VerifyOptions,
    to_json,
)

if TYPE_CHECKING:
    import torch

    from ggufkit.quantize.replace import Replaced, RoundedRows
    from ggufkit.scaling.calibration import Sequences
    from ggufkit.scaling.fold import Change

IMPORTANCE = "importance.safetensors"
_IN_BLOCK = re.compile(r"\.\d+\.")
_FOLDED = "awq"
"""Directory of a folded checkpoint that holds its scales and how they were found."""
_AWQ_VERSION = 5
_IMATRIX_VERSION = 2
_ROUND_VERSION = 3
_REPLACE_VERSION = 3
_REFINE_VERSION = 2
_MORE_TO_REFINE = 4
"""How many times the text that rounding sees is learned from afterwards."""
ROUNDING_KEY = "ggufkit.rounding"
"""The key of a GGUF that says how its blocks were rounded, if not by llama-quantize."""


@dataclass
class Conversion:
    """One checkpoint on its way to GGUFs.

    Attributes:
        store: the models directory.
        build: the native tools.
        checkpoint: the model.
        fetch: how it was fetched.
        calibration: what AWQ looks at.
        types: the quantization types to make; none if only scales are wanted.
        progress: who to tell.
        awq: how scales are found and kept.
        imatrix: the importance matrix to quantize with: a file, or ``auto`` for
            one of the calibration text.
        rounding: how weights are rounded onto the grid of their type.
        guard: whether files made in a simpler way will be looked at too.
        verify: how float GGUFs are compared with the checkpoint.
        converter: llama.cpp's converter, if it was started already.
    """

    store: Store
    build: NativeBuild
    checkpoint: Checkpoint
    fetch: FetchOptions
    calibration: Calibration
    types: Sequence[str]
    progress: Progress
    awq: AwqOptions = field(default_factory=AwqOptions)
    imatrix: Path | Literal["auto"] | None = None
    rounding: RoundingOptions = field(default_factory=RoundingOptions)
    guard: bool = False
    verify: VerifyOptions = field(default_factory=VerifyOptions)
    converter: Converter | None = None
    _intermediates: list[Artifact] = field(default_factory=list)

    @cached_property
    def prepared(self) -> Prepared:
        """The checkpoint with what could be mended, in a directory of links.

        Raises:
            CheckpointError: its files contradict each other.
        """
        opened = open_checkpoint(
            self.checkpoint.path,
            trust_remote_code=self.fetch.trust_remote_code,
            allow_pickle=self.fetch.allow_pickle,
        )
        scratch = Path(mkdtemp(prefix="ggufkit-"))
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        return prepare_checkpoint(opened, scratch / self.checkpoint.name)

    @property
    def index(self) -> CheckpointIndex:
        """The index of the prepared checkpoint, which all stages read."""
        return self.prepared.index

    @cached_property
    def family(self) -> Family:
        """The AWQ family."""
        return family_of(self.index.config)

    @property
    def stored_dtype(self) -> str | None:
        """What changed tensors are stored in; None for their own dtype."""
        asked = self.awq.dtype
        if asked == "auto":
            asked = "f16" if self.types and self.index.dtype in ("F16", "BF16") else "keep"
        return None if asked == "keep" else asked.upper()

    @property
    def exact(self) -> bool:
        """Whether only powers of two fold exactly into the tensors' dtype."""
        return self.stored_dtype is None and self.index.dtype in ("F16", "BF16")

    @cached_property
    def calibration_text(self) -> Text:
        """The calibration text."""
        return texts.load_calibration(
            self.calibration.text,
            column=self.calibration.column,
            text_dir=settings.text_dir(),
            cache=settings.cache_dir(),
            progress=self.progress,
        )

    def check_before_work(self, *, folded: bool) -> None:
        """Refuse what would fail late: a disk that is too small.

        Called by work that is about to start, not for results that are there.
        """
        copies = (1 if self.types else 0) + (1 if folded else 0)
        wider = self.index.parameters * {"F16": 2, "F32": 4}.get(self.stored_dtype or "", 0)
        needed = copies * max(self.index.nbytes, wider)
        needed += space_forecast(self.index.parameters, self.types)
        require_space(self.store.root, needed, f"converting {self.checkpoint.name}")

    def check_importance(self) -> None:
        """Refuse a type that needs an importance matrix, and a matrix of another model.

        Raises:
            GgufkitError: before any work; what needs a GGUF to see is checked later.
        """
        if isinstance(self.imatrix, Path):
            check_against_checkpoint(self.imatrix, read_imatrix(self.imatrix), self.index)
        elif self.imatrix is None:
            side = 0 if "GPT2LMHeadModel" in self.index.architectures else -1
            columns = {
                tensor.shape[side]
                for name, tensor in self.index.tensors.items()
                if len(tensor.shape) > 1 and _IN_BLOCK.search(name)
            }
            for type in self.types:
                require_importance(type, columns)

    @cached_property
    def sequences(self) -> "Sequences":
        """The calibration text as token ids, with pieces of it held back."""
        cut = self._cut(self.calibration.samples)
        if len(cut.tokens) < self.calibration.samples:
            self.progress.warn(
                f"{self.calibration_text.name} gives only {len(cut.tokens)} of the "
                f"{self.calibration.samples} calibration sequences asked for"
            )
        return cut

    def _cut(self, samples: int) -> "Sequences":
        from ggufkit.scaling.calibration import cut_sequences, read_documents
        from ggufkit.scaling.streaming import load_torch

        load_torch()
        trust = self.fetch.trust_remote_code
        documents, kind = read_documents(
            self.calibration_text.path,
            self.index,
            name=Path(self.calibration_text.name).name,
            trust_remote_code=trust,
            progress=self.progress,
        )
        cut = cut_sequences(
            documents,
            self.index,
            samples=samples,
            length=self.calibration.length,
            seed=self.calibration.seed,
            trust_remote_code=trust,
        )
        return dataclasses.replace(cut, facts={"kind": kind, **cut.facts})

    @cached_property
    def held_back_text(self) -> Text:
        """The calibration text's pieces that neither AWQ nor the imatrix sees."""
        from ggufkit.scaling.calibration import text_of

        content = text_of(
            self.sequences.held_back,
            self.index,
            trust_remote_code=self.fetch.trust_remote_code,
        )
        return texts.keep_text(
            f"held-back part of {self.calibration_text.name}",
            content,
            self.calibration_text.source,
            settings.cache_dir(),
        )

    def plans_for(
        self, types: Iterable[str], meanwhile: Callable[[], object] | None = None
    ) -> dict[str, dict[str, PlannedTensor]]:
        """What becomes of each tensor, for each type; see :func:`stages.plan`."""
        return {
            type: stages.plan(
                self.store,
                self.build,
                self.checkpoint,
                self.prepared,
                type,
                self.progress,
                imatrix=self.imatrix is not None,
                meanwhile=meanwhile,
                converter=self._started_converter,
            )
            for type in types
        }

    def scales_for(self, types: Iterable[str]) -> dict[str, Artifact]:
        """Scales for each type, searched together in one pass over the text.

        Types whose tensors all get the same ggml types share one search.

        Raises:
            CheckpointError: if the architecture has no AWQ family; before any work.
        """
        assert self.family  # unknown ones are refused before any work
        if self.awq.scales or self.awq.backend != "ggufkit":
            return dict.fromkeys(types, self._scales_from_elsewhere())
        plans = {
            type: {name: told.type or "f32" for name, told in plan.items()}
            for type, plan in self.plans_for(types, meanwhile=lambda: self.sequences).items()
        }
        by_key = {canonical_json(plan): plan for plan in plans.values()}
        found: dict[str, Artifact] = {}
        self._search(list(by_key.items()), {}, found)
        return {type: found[canonical_json(plan)] for type, plan in plans.items()}

    def _search(
        self,
        waiting: list[tuple[str, Mapping[str, str]]],
        opened: dict[str, tuple[Path, Mapping[str, str]]],
        found: dict[str, Artifact],
    ) -> dict[str, Json]:
        """Open each plan's stage inside the one before, then search for all at once.

        Each plan has an artifact of its own, but the pass over the text, which
        costs as much as a search, is shared. Returns facts by plan.
        """
        if not waiting:
            return self._search_now(opened) if opened else {}
        (key, plan), *rest = waiting
        facts: dict[str, Json] = {}

        def work(directory: Path) -> dict[str, Json]:
            facts.update(self._search(rest, {**opened, key: (directory, plan)}, found))
            return {"calibration": self.calibration_text.name, **facts[key]}

        found[key] = self.store.run(
            "awq",
            version=_AWQ_VERSION,
            model=self.checkpoint.name,
            inputs=self._calibration_inputs,
            options={
                **self._calibration_options,
                "plan": plan,
                "imatrix": self.imatrix == "auto",
                "exact": self.exact,
                "stored": self.stored_dtype,
                "clip": self.awq.clip,
                "sensitivity": self.awq.sensitivity,
            },
            tool=self._scaling_tool,
            work=work,
            resume=True,
            progress=self.progress,
        )
        if found[key].reused:
            facts.update(self._search(rest, opened, found))
        return facts

    @property
    def _calibration_inputs(self) -> dict[str, Json]:
        return {
            "checkpoint": self.checkpoint.digest,
            "calibration": self.calibration_text.digest,
        }

    @property
    def _calibration_options(self) -> dict[str, Json]:
        return {
            "samples": self.calibration.samples,
            "length": self.calibration.length,
            "seed": self.calibration.seed,
        }

    @property
    def _scaling_tool(self) -> dict[str, Json]:
        return {
            "llama.cpp": self.build.commit,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    @property
    def _sequence_facts(self) -> dict[str, Json]:
        return {"tokens": self.sequences.tokens.numel(), "sequences": self.sequences.facts}

    def _search_now(self, opened: Mapping[str, tuple[Path, Mapping[str, str]]]) -> dict[str, Json]:
        self.check_before_work(folded=True)
        # These bring torch, which a plain conversion does not need.
        from ggufkit.llamacpp.ggml import Ggml
        from ggufkit.scaling.awq import Job, search_scales
        from ggufkit.scaling.memory import forecast, require_memory

        count, length = self.sequences.tokens.shape
        needed = forecast(self.index, self.family, sequences=count, length=length)
        require_memory(needed, f"searching scales for {self.checkpoint.name}")
        told = search_scales(
            self.index,
            self.family,
            self.sequences.tokens,
            [
                Job(
                    directory,
                    plan,
                    importance=self.imatrix == "auto",
                    exact=self.exact,
                    clip=self.awq.clip,
                )
                for directory, plan in opened.values()
            ],
            Ggml(self.build.bin, settings.threads()),
            self.progress,
            token_weights=self._token_weights(next(iter(opened.values()))[0]),
            trust_remote_code=self.fetch.trust_remote_code,
        )
        return {
            key: {
                **self._sequence_facts,
                "divergence": self._check_function(directory),
                **told[directory.name],
            }
            for key, (directory, _) in opened.items()
        }

    def _token_weights(self, scratch: Path) -> "dict[str, torch.Tensor] | None":
        if not self.awq.sensitivity:
            return None
        from ggufkit.scaling.sensitivity import token_weights

        return token_weights(
            self.index,
            self.family,
            self.sequences.tokens,
            self.progress,
            scratch=scratch,
            trust_remote_code=self.fetch.trust_remote_code,
        )

    def _scales_from_elsewhere(self) -> Artifact:
        """Scales of a file, or of AutoAWQ's own search; one set for all types."""
        from ggufkit.scaling.autoawq import autoawq_version

        given = self.awq.scales
        # The calibration text serves the check alone when scales are given.
        searched_on = leaks.records_of_scales(self.store, given) if given else ()

        def work(directory: Path) -> dict[str, Json]:
            from ggufkit.scaling.awq import SCALES_FILE
            from ggufkit.scaling.fold import CLIP, powers_of_two, read_scales, write_scales

            self.check_before_work(folded=True)
            scales = read_scales(given) if given else self._autoawq_scales()
            if self.exact:
                scales = powers_of_two(scales)
            write_scales(directory / SCALES_FILE, scales)
            return {
                "calibration": self.calibration_text.name,
                **self._sequence_facts,
                **({"calibrated": to_json(searched_on)} if given else {}),
                "divergence": self._check_function(directory),
                "groups": sum(not name.endswith(CLIP) for name in scales),
                "groups_left_alone": sum(bool((s == 1).all()) for s in scales.values()),
                "rows_clipped": sum(
                    int(limit.isfinite().sum()) for n, limit in scales.items() if n.endswith(CLIP)
                ),
            }

        return self.store.run(
            "awq",
            version=_AWQ_VERSION,
            model=self.checkpoint.name,
            inputs={
                **self._calibration_inputs,
                "scales": self.store.digest(given).sha256 if given else "",
            },
            options={
                **self._calibration_options,
                "backend": "file" if given else self.awq.backend,
                "exact": self.exact,
                "stored": self.stored_dtype,
            },
            tool={**self._scaling_tool, **({} if given else {"autoawq": autoawq_version()})},
            work=work,
            progress=self.progress,
        )

    def _autoawq_scales(self) -> "dict[str, torch.Tensor]":
        from ggufkit.scaling.autoawq import autoawq_scales

        return autoawq_scales(
            self.index,
            self.family,
            self.sequences.tokens,
            self.progress,
            trust_remote_code=self.fetch.trust_remote_code,
        )

    def _check_function(self, directory: Path) -> float:
        """Refuse scales whose fold would change what the model computes.

        Clipping changes it, so with that the figure is told and not judged.
        """
        from ggufkit.scaling.awq import SCALES_FILE
        from ggufkit.scaling.fold import CLIP, read_scales
        from ggufkit.scaling.guard import fold_divergence, require_same_function

        scales = read_scales(directory / SCALES_FILE)
        with self.progress.task("comparing with the original"):
            divergence = fold_divergence(
                self.index,
                self.family,
                scales,
                self.sequences.held_back[:1],
                scratch=directory,
                dtype=self.stored_dtype,
                trust_remote_code=self.fetch.trust_remote_code,
            )
        if any(name.endswith(CLIP) for name in scales):
            self.progress.warn(
                f"clipping changed the function: mean KL divergence {divergence:.1e} nats per token"
            )
        else:
            require_same_function(divergence, self.checkpoint.name)
        return divergence

    def imatrix_for(self, scales: Artifact | None) -> Artifact:
        """The importance matrix of the model, with scales folded in or as it is.

        Raises:
            CheckpointError: if the architecture has no AWQ family.
        """
        own = scales and IMPORTANCE in scales.manifest.outputs
        source = scales if scales and own else self._importance()
        (plan,) = self.plans_for(["Q8_0"]).values()

        def work(directory: Path) -> dict[str, Json]:
            from ggufkit.quantize.imatrix import write_imatrix
            from ggufkit.scaling.fold import read_scales
            from ggufkit.scaling.importance import after_fold, read_importance

            importance = read_importance(source.path / IMPORTANCE)
            if scales:
                folded = read_scales(stages.scales_file(scales))
                importance = after_fold(importance, self.index, self.family, folded)
            squares = {name: (seen.mean.numpy(), seen.tokens) for name, seen in importance.items()}
            write_imatrix(
                directory / "imatrix.gguf",
                stages.imatrix_entries(plan, squares),
                dataset=self.calibration_text.name,
                chunk_tokens=self.calibration.length,
                chunks=source.manifest.facts["tokens"] // self.calibration.length,
            )
            return {"calibration": self.calibration_text.name}

        return self.store.run(
            "imatrix",
            version=_IMATRIX_VERSION,
            model=self.checkpoint.name,
            inputs={
                "importance": source.manifest.outputs[IMPORTANCE].sha256,
                "scales": stages.scales_digest(scales),
            },
            options={"calibration": self.calibration_text.name},
            tool={"llama.cpp": self.build.commit},
            work=work,
            progress=self.progress,
        )

    def _importance(self) -> Artifact:
        """What all linear maps see, without scales."""
        assert self.family

        def work(directory: Path) -> dict[str, Json]:
            from ggufkit.scaling.importance import gather_importance

            self.check_before_work(folded=False)
            gather_importance(
                self.index,
                self.family,
                self.sequences.tokens,
                directory,
                self.progress,
                trust_remote_code=self.fetch.trust_remote_code,
            )
            return {"calibration": self.calibration_text.name, **self._sequence_facts}

        return self.store.run(
            "importance",
            version=_IMATRIX_VERSION,
            model=self.checkpoint.name,
            inputs=self._calibration_inputs,
            options=self._calibration_options,
            tool=self._scaling_tool,
            work=work,
            progress=self.progress,
        )

    def fold_into(self, scales: Path, directory: Path) -> None:
        """Write the checkpoint with the scales of a file folded in."""
        from ggufkit.checkpoint.write import write_checkpoint
        from ggufkit.scaling.fold import changes_of, read_scales

        changes = changes_of(self.index, self.family, read_scales(scales), self.stored_dtype)
        write_checkpoint(
            self.index,
            directory,
            changes,
            dtypes={name: change.dtype for name, change in changes.items()},
            progress=self.progress,
        )

    def publish_folded(self, scales: Artifact, out: Path) -> None:
        """Write the folded checkpoint, whole or not at all, with its scales in ``awq/``."""
        scratch = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            self.fold_into(stages.scales_file(scales), scratch)
            # Not beside the shards, where loaders look for weights.
            shutil.copytree(scales.path, scratch / _FOLDED)
            if self.imatrix == "auto":
                shutil.copyfile(
                    self.imatrix_for(scales).file(".gguf"), scratch / _FOLDED / "imatrix.gguf"
                )
            if out.exists():
                out.rmdir()
            os.replace(scratch, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def quantize(self, type: str, scales: Artifact | None) -> Artifact:
        """The GGUF of one type; makes the intermediate if it is needed."""
        imatrix = self._imatrix_file(scales)
        return stages.quantize(
            self.store,
            self.build,
            model=self.checkpoint.name,
            inputs=self._source_inputs(scales),
            recipe=self._recipe(type, imatrix),
            stem=self._stem(scales, imatrix),
            origin=self.checkpoint.origin,
            source=lambda: self._intermediate(scales),
            imatrix=imatrix,
            calibrated=to_json(self._calibrated(scales, imatrix)),
            verify=self.verify,
            verification=lambda: self._intermediates[-1].manifest.facts["verification"],
            own_imatrix=self.imatrix == "auto",
            mended=self._mended,
            progress=self.progress,
        )

    def _mended(self) -> tuple[str, ...]:
        """What was mended, by those who prepared and converted the checkpoint."""
        told = [
            note for made in self._intermediates for note in made.manifest.facts.get("mended", ())
        ]
        return tuple(dict.fromkeys((*self.prepared.notes, *told)))

    def _imatrix_file(self, scales: Artifact | None) -> Path | None:
        return self.imatrix_for(scales).file(".gguf") if self.imatrix == "auto" else self.imatrix

    def _source_inputs(self, scales: Artifact | None) -> dict[str, Json]:
        return {"checkpoint": self.checkpoint.digest, "scales": stages.scales_digest(scales)}

    def _recipe(self, type: str, imatrix: Path | None) -> QuantRecipe:
        return QuantRecipe(type, imatrix=self.store.digest(imatrix).sha256 if imatrix else "")

    def _stem(self, scales: Artifact | None, imatrix: Path | None, rounding: str = "") -> str:
        ways = ("-awq" if scales else "") + rounding + ("-imatrix" if imatrix else "")
        return f"{self.checkpoint.name}{ways}"

    def _intermediate(self, scales: Artifact | None) -> Path:
        """The float GGUF, with scales folded in or not; it is deleted in the end."""
        self.check_before_work(folded=scales is not None)

        def fold(directory: Path) -> None:
            assert scales is not None
            self.fold_into(stages.scales_file(scales), directory)

        outtype = (scales and (self.stored_dtype or "").lower()) or stages.outtype_of(self.index)
        made = stages.convert(
            self.store,
            self.build,
            self.checkpoint,
            self.prepared,
            scales,
            fold if scales else None,
            self.progress,
            outtype=outtype,
            verifying=(lambda: self._verifying(outtype)) if self.verify.enabled else None,
            verify=self.verify,
            converter=self._started_converter,
        )
        self._intermediates.append(made)
        return made.file(".gguf")

    def close(self) -> None:
        """End a converter that got no task."""
        if started := self._started_converter():
            started.close()

    def _started_converter(self) -> Converter | None:
        """The converter that waits for a task; it takes one alone."""
        started, self.converter = self.converter, None
        return started

    @contextmanager
    def _verifying(self, outtype: str) -> Iterator[stages.Compare]:
        """Ask transformers while the converter writes, then compare what it wrote."""
        from ggufkit.verify.check import Verifier

        with Verifier(
            self.index,
            original=self.checkpoint.path,
            trust_remote_code=self.fetch.trust_remote_code,
            stored=outtype.upper(),
            allowed=self.verify.allowed,
        ) as verifier:
            verifier.start()

            def compare(gguf: Path, read: Json) -> Json:
                with self.progress.task("comparing with the checkpoint"):
                    verification = verifier.check(
                        gguf, lambda: suspicious_keys(read, self.index.config)
                    )
                verification.require_same()
                return verification.facts

            yield compare

    def make(self, type: str, scales: Artifact | None) -> Artifact:
        """The GGUF of one type, rounded as was asked for."""
        if self.rounding.method == "gptq" and not is_float(type):
            return self.quantize_rounded(type, scales)
        return self.quantize(type, scales)

    def require_known_blocks(self) -> None:
        """Refuse to round a model whose blocks are not known.

        Raises:
            CheckpointError: if there is no row for its architecture.
        """
        try:
            assert self.family
        except CheckpointError as error:
            raise CheckpointError(
                f"GPTQ needs to know the order of a model's blocks: {error.message}",
                "Convert with --rounding ggml",
            ) from error

    def quantize_rounded(self, type: str, scales: Artifact | None) -> Artifact:
        """The GGUF of one type as llama-quantize makes it, linear maps rounded otherwise."""
        imatrix = self._imatrix_file(scales)
        rounded = self._rounded_for(type, scales)
        refined = self._refined(type, scales, rounded) if self.rounding.refine else rounded
        blocks = {name: output.sha256 for name, output in refined.manifest.outputs.items()}
        stem = self._stem(scales, imatrix, self.rounding.suffix)

        def work(directory: Path) -> dict[str, Json]:
            stock = self.quantize(type, scales)
            if not (stock.reused or self.guard):
                self._intermediates.append(stock)
            out = directory / f"{stem}-{type}.gguf"
            told = self._replace(type, scales, refined, stock, out)
            check_opens(out)
            looked_at = leaks.Calibrated(
                "GPTQ", self.calibration_text.name, self.calibration_text.digest
            )
            calibrated = (*self._calibrated(scales, imatrix), looked_at)
            keys = ("loss", "loss_plain", "loss_importance", "tensors", "seconds", "cpu_seconds")
            facts = {**rounded.manifest.facts, "seconds": rounded.manifest.seconds}
            return {
                **stock.manifest.facts,
                "nbytes": out.stat().st_size,
                "calibrated": to_json(calibrated),
                "rounding": {
                    "label": self.rounding.label,
                    **{key: facts[key] for key in keys if key in facts},
                    **to_json(told),
                    **({"refinement": _facts_and_time(refined)} if refined is not rounded else {}),
                },
            }

        return self.store.run(
            "quantize",
            version=_REPLACE_VERSION,
            model=self.checkpoint.name,
            inputs={
                **self._source_inputs(scales),
                "rounded": hashlib.sha256(canonical_json(blocks).encode()).hexdigest(),
            },
            options={
                "recipe": self._recipe(type, imatrix),
                "stem": stem,
                "rounding": self.rounding,
                "calibration": self.calibration_text.name,
                **self._calibration_options,
                **self.verify.key,
            },
            tool={"llama.cpp": self.build.commit},
            work=work,
            progress=self.progress,
        )

    def _rounded_for(self, type: str, scales: Artifact | None) -> Artifact:
        """Blocks of the linear maps, rounded with error feedback."""
        self.require_known_blocks()
        told = self.plans_for([type], meanwhile=lambda: self.sequences)[type]
        plan = {
            name: planned.type
            for name, planned in told.items()
            if planned.type and not is_float(planned.type.upper())
        }

        def work(directory: Path) -> dict[str, Json]:
            self.check_before_work(folded=scales is not None)
            from ggufkit.llamacpp.ggml import Ggml
            from ggufkit.scaling.memory import require_memory
            from ggufkit.scaling.rounding import forecast, round_model

            count, length = self.sequences.tokens.shape
            needed = forecast(self.index, self.family, plan, sequences=count, length=length)
            require_memory(needed, f"rounding {self.checkpoint.name}")
            before = time.process_time()
            facts = round_model(
                self.index,
                self.family,
                self.sequences.tokens,
                plan,
                directory,
                Ggml(self.build.bin, settings.threads()),
                self.progress,
                threads=settings.threads(),
                changes=self._changes(scales),
                trust_remote_code=self.fetch.trust_remote_code,
            )
            return {
                "calibration": self.calibration_text.name,
                **self._sequence_facts,
                **facts,
                "cpu_seconds": round(time.process_time() - before, 1),
            }

        return self.store.run(
            "round",
            version=_ROUND_VERSION,
            model=self.checkpoint.name,
            inputs={**self._calibration_inputs, "scales": stages.scales_digest(scales)},
            options={
                **self._calibration_options,
                "plan": plan,
                "stored": self.stored_dtype if scales else None,
            },
            tool=self._scaling_tool,
            work=work,
            resume=True,
            progress=self.progress,
        )

    def _refined(self, type: str, scales: Artifact | None, rounded: Artifact) -> Artifact:
        """The same blocks, with scales learned on the divergence from the original."""
        plan = rounded.manifest.options["plan"]

        def work(directory: Path) -> dict[str, Json]:
            self.check_before_work(folded=False)
            from ggufkit.llamacpp.ggml import Ggml
            from ggufkit.scaling.memory import require_memory
            from ggufkit.scaling.refine import forecast, refine_model

            _, length = self.sequences.tokens.shape
            needed = forecast(self.index, self.family, plan, length=length)
            require_memory(needed, f"refining {self.checkpoint.name}")
            before = time.process_time()
            facts = refine_model(
                self.index,
                self.family,
                self._sequences_to_refine,
                self.sequences.held_back,
                plan,
                rounded.path,
                directory,
                Ggml(self.build.bin, settings.threads()),
                self.progress,
                changes=self._changes(scales),
                trust_remote_code=self.fetch.trust_remote_code,
            )
            return {
                "calibration": self.calibration_text.name,
                "tokens": self._sequences_to_refine.numel(),
                **facts,
                "cpu_seconds": round(time.process_time() - before, 1),
            }

        return self.store.run(
            "refine",
            version=_REFINE_VERSION,
            model=self.checkpoint.name,
            inputs={
                **self._calibration_inputs,
                "scales": stages.scales_digest(scales),
                "rounded": rounded.manifest.key,
            },
            options={**self._calibration_options, "stored": self.stored_dtype if scales else None},
            tool=self._scaling_tool,
            work=work,
            resume=True,
            progress=self.progress,
        )

    @cached_property
    def _sequences_to_refine(self) -> "torch.Tensor":
        """More of the calibration text than rounding sees, without what is held back."""
        from ggufkit.scaling.refine import without

        more = self._cut(_MORE_TO_REFINE * self.calibration.samples)
        return without((more.tokens, more.held_back), self.sequences.held_back)

    def _changes(self, scales: Artifact | None) -> "dict[str, Change]":
        """What the fold of scales does to each tensor."""
        from ggufkit.scaling.fold import changes_of, read_scales

        if scales is None:
            return {}
        found = read_scales(stages.scales_file(scales))
        return changes_of(self.index, self.family, found, self.stored_dtype)

    def _replace(
        self, type: str, scales: Artifact | None, rounded: Artifact, stock: Artifact, out: Path
    ) -> "Replaced":
        from ggufkit.quantize.replace import replace_rounded

        note = (
            f"{self.rounding.label} by ggufkit on {self.calibration.samples} x "
            f"{self.calibration.length} tokens of {Path(self.calibration_text.name).name} "
            f"(sha256 {self.calibration_text.digest[:12]})"
        )
        told = replace_rounded(
            stock.file(".gguf"),
            self._intermediate(scales),
            out,
            self._rounded_rows(type, scales, rounded),
            (ROUNDING_KEY, note),
        )
        kept = [tensor for tensor in told.left_alone if tensor.name.startswith("blk.")]
        if kept:
            reasons = Counter(tensor.reason for tensor in kept)
            self.progress.warn(
                f"{type}: {len(kept)} of {len(kept) + len(told.names)} quantized tensors of the "
                f"blocks ({_share(sum(t.parameters for t in kept), told.parameters)} of their "
                "weights) keep llama-quantize's rounding: "
                + ", ".join(f"{count} ({reason})" for reason, count in reasons.items())
                + f"; such as {kept[0].name}"
            )
        return told

    def _rounded_rows(
        self, type: str, scales: Artifact | None, rounded: Artifact
    ) -> "Iterator[RoundedRows]":
        from ggufkit.checkpoint.tensors import TensorReader
        from ggufkit.quantize.replace import RoundedRows
        from ggufkit.scaling.rounding import read_rounded

        (plan,) = self.plans_for([type]).values()
        changes = self._changes(scales)
        with TensorReader(self.index) as reader:
            for name, packed in read_rounded(rounded.path):
                weight = reader.load(name)
                weight = (changes[name](weight) if name in changes else weight).float()
                rows = weight.T.contiguous() if self.family.transposed else weight
                yield RoundedRows(plan[name].gguf_names, plan[name].type, rows.numpy(), packed)

    def _calibrated(
        self, scales: Artifact | None, imatrix: Path | None
    ) -> tuple[leaks.Calibrated, ...]:
        """What a file of this checkpoint is calibrated on, scales folded in before included."""
        folded = self.checkpoint.path / _FOLDED / stages.SCALES_FILE
        found = leaks.records_of_scales(self.store, folded) if folded.is_file() else ()
        if scales:
            found += leaks.records_of(self.store, scales.manifest)
        if imatrix:
            found += leaks.records_of_imatrix(self.store, imatrix)
        return tuple(dict.fromkeys(found))

    def guarded(self, type: str, made: Artifact, scales: Artifact | None) -> tuple[Artifact, str]:
        """The best on held-back text of a file and the same made in simpler ways.

        Returns:
            The file's artifact, and in words why it was kept.
        """
        ways: dict[str, Artifact] = {}
        if self.rounding.method == "gptq":
            ways["AWQ and GPTQ" if scales else "GPTQ"] = made
        if scales:
            ways["AWQ"] = self.quantize(type, scales)
        ways["plain"] = self.quantize(type, None)
        measured = {way: self._measured(artifact) for way, artifact in ways.items()}
        # Of equals the simplest, which comes last.
        best = min(reversed(measured), key=lambda way: measured[way].perplexity)
        figures = ", ".join(
            f"{found.perplexity:.4f} " + ("without" if way == "plain" else f"with {way}")
            for way, found in measured.items()
        )
        told = (
            f"{type} guard: {best} kept; perplexity on {measured[best].chunks} held-back "
            f"chunks {figures}"
        )
        self.progress.say(told)
        return ways[best], told

    def _measured(self, artifact: Artifact) -> EvalResult:
        return perplexity.measure(
            self.store,
            self.build,
            artifact.file(".gguf"),
            self.held_back_text,
            context=self.calibration.length,
            chunks=None,
            gpu_layers=0,
            progress=self.progress,
        )

    def remove_intermediates(self) -> None:
        """Delete the float GGUFs that this conversion used, and files that were only a step."""
        for artifact in {a.path: a for a in self._intermediates}.values():
            self.store.remove(artifact)
        self._intermediates.clear()


def rounding_notes(artifact: Artifact) -> tuple[str, ...]:
    """What rounding with error feedback did for a file, in words; nothing for others."""
    told = artifact.manifest.facts.get("rounding")
    if told is None:
        return ()
    left = sum(tensor["parameters"] for tensor in told["left_alone"])
    count = len(told["names"])
    losses = [told[key] for key in ("loss", "loss_plain", "loss_importance")]
    note = (
        f"{artifact.manifest.options['recipe']['type']} {told['label']}: {count} of "
        f"{count + len(told['left_alone'])} quantized tensors "
        f"({_share(told['parameters'], left)} of their weights)"
    )
    if losses[1] > 0 and losses[2] > 0:
        note += (
            f"; summed errors of their outputs {losses[0] / losses[1]:.2f} times those of plain "
            f"rounding, {losses[0] / losses[2]:.2f} times those with an importance matrix"
        )
    if refinement := told.get("refinement"):
        before, after = (refinement[f"divergence_{when}"] for when in ("before", "after"))
        note += f"; divergence on held-back text {before:.5f} before learning, {after:.5f} after"
    return (note,)


def _facts_and_time(artifact: Artifact) -> dict[str, Json]:
    return {**artifact.manifest.facts, "seconds": artifact.manifest.seconds}


def _share(part: int, rest: int) -> str:
    return f"{100 * part / (part + rest):.0f} %"
