"""One checkpoint on its way to GGUFs: its stages, with what they share.

The rooms do not know each other; here their values meet. Only the pipeline
uses this.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from ggufkit import settings
from ggufkit.checkpoint.index import CheckpointIndex, open_checkpoint
from ggufkit.checkpoint.tokenizer import check_tokenizer
from ggufkit.evaluate import texts
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Progress
from ggufkit.quantize import stages
from ggufkit.quantize.types import space_forecast
from ggufkit.scaling.families import Family, family_of
from ggufkit.store import Store, canonical_json, require_space
from ggufkit.values import Artifact, Calibration, Checkpoint, FetchOptions, Json, QuantRecipe, Text

_AWQ_VERSION = 1


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
    """

    store: Store
    build: NativeBuild
    checkpoint: Checkpoint
    fetch: FetchOptions
    calibration: Calibration
    types: Sequence[str]
    progress: Progress
    _intermediates: list[Artifact] = field(default_factory=list)

    @cached_property
    def index(self) -> CheckpointIndex:
        """The checkpoint's index."""
        return open_checkpoint(
            self.checkpoint.path,
            trust_remote_code=self.fetch.trust_remote_code,
            allow_pickle=self.fetch.allow_pickle,
        )

    @cached_property
    def family(self) -> Family:
        """The AWQ family."""
        return family_of(self.index.architectures[0])

    @cached_property
    def calibration_text(self) -> Text:
        """The calibration text."""
        return texts.load_text(
            self.calibration.text,
            column=self.calibration.column,
            text_dir=settings.text_dir(),
            cache=settings.cache_dir(),
            progress=self.progress,
        )

    def check_before_work(self, *, folded: bool) -> None:
        """Refuse what would fail late: a wrong tokenizer, a disk that is too small.

        Called by work that is about to start, not for results that are there.
        """
        check_tokenizer(self.index)
        copies = (1 if self.types else 0) + (1 if folded else 0)
        needed = copies * self.index.nbytes + space_forecast(self.index.parameters, self.types)
        require_space(self.store.root, needed, f"converting {self.checkpoint.name}")

    def scales_for(self, types: Iterable[str]) -> dict[str, Artifact]:
        """Scales for each type, searched together in one pass over the text.

        Types whose tensors all get the same ggml types share one search.

        Raises:
            CheckpointError: if the architecture has no AWQ family; before any work.
        """
        family_of(self.index.architectures[0])
        plans = {
            type: stages.plan(
                self.store, self.build, self.checkpoint, self.index, type, self.progress
            )
            for type in types
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
            inputs={
                "checkpoint": self.checkpoint.digest,
                "calibration": self.calibration_text.digest,
            },
            options={
                "plan": plan,
                "samples": self.calibration.samples,
                "length": self.calibration.length,
            },
            tool={
                "llama.cpp": self.build.commit,
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
            work=work,
            resume=True,
            progress=self.progress,
        )
        if found[key].reused:
            facts.update(self._search(rest, opened, found))
        return facts

    def _search_now(self, opened: Mapping[str, tuple[Path, Mapping[str, str]]]) -> dict[str, Json]:
        self.check_before_work(folded=True)
        # These bring torch, which a plain conversion does not need.
        from ggufkit.llamacpp.ggml import Ggml
        from ggufkit.scaling.awq import Job, search_scales
        from ggufkit.scaling.statistics import sequences_from_text

        sequences = sequences_from_text(
            self.calibration_text.path.read_text(encoding="utf-8"),
            self.index,
            self.calibration.samples,
            self.calibration.length,
            trust_remote_code=self.fetch.trust_remote_code,
        )
        if len(sequences) < self.calibration.samples:
            self.progress.warn(
                f"{self.calibration_text.name} gives only {len(sequences)} of the "
                f"{self.calibration.samples} calibration sequences asked for"
            )
        told = search_scales(
            self.index,
            self.family,
            sequences,
            [Job(directory, plan) for directory, plan in opened.values()],
            Ggml(self.build.bin, settings.threads()),
            self.progress,
            trust_remote_code=self.fetch.trust_remote_code,
        )
        return {
            key: {"tokens": sequences.numel(), **told[directory.name]}
            for key, (directory, _) in opened.items()
        }

    def fold_into(self, scales: Artifact, directory: Path) -> None:
        """Write the checkpoint with scales folded in."""
        from ggufkit.checkpoint.write import write_checkpoint
        from ggufkit.scaling.fold import read_scales, replacements

        write_checkpoint(
            self.index,
            directory,
            replacements(self.index, self.family, read_scales(scales.file(".safetensors"))),
            progress=self.progress,
        )

    def publish_folded(self, scales: Artifact, out: Path) -> None:
        """Write the folded checkpoint, whole or not at all, with its scales in ``awq/``."""
        scratch = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            self.fold_into(scales, scratch)
            # Not beside the shards, where loaders look for weights.
            shutil.copytree(scales.path, scratch / "awq")
            if out.exists():
                out.rmdir()
            os.replace(scratch, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def quantize(self, type: str, scales: Artifact | None) -> Artifact:
        """The GGUF of one type; makes the intermediate if it is needed."""

        def fold(directory: Path) -> None:
            assert scales is not None
            self.fold_into(scales, directory)

        def source() -> Path:
            self.check_before_work(folded=scales is not None)
            made = stages.convert(
                self.store,
                self.build,
                self.checkpoint,
                self.index,
                scales,
                fold if scales else None,
                self.progress,
            )
            self._intermediates.append(made)
            return made.file(".gguf")

        return stages.quantize(
            self.store,
            self.build,
            model=self.checkpoint.name,
            inputs={
                "checkpoint": self.checkpoint.digest,
                "scales": stages.scales_digest(scales),
            },
            recipe=QuantRecipe(type),
            stem=f"{self.checkpoint.name}-awq" if scales else self.checkpoint.name,
            origin=self.checkpoint.origin,
            source=source,
            progress=self.progress,
        )

    def remove_intermediates(self) -> None:
        """Delete the float GGUFs that this conversion used."""
        for artifact in {a.path: a for a in self._intermediates}.values():
            self.store.remove(artifact)
        self._intermediates.clear()
