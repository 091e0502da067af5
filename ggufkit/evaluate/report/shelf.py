"""The models that results belong to, by digest."""

from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from pathlib import Path

from ggufkit.evaluate.report import words
from ggufkit.evaluate.report.values import ModelFile
from ggufkit.evaluate.results import Results


class Shelf:
    """What is known of each model, whether its file is at hand or only its results are.

    Args:
        files: GGUFs at hand.
        results: all that is stored.
    """

    def __init__(self, files: Sequence[ModelFile], results: Results) -> None:
        self._files = {file.digest: file for file in files}
        self._paths: dict[str, Path] = {}
        self._nbytes: dict[str, int] = {}
        for stored in results.every:
            self._paths[stored.model] = stored.value.model
            self._nbytes[stored.model] = stored.value.file_nbytes or self._nbytes.get(
                stored.model, 0
            )
        for compared in results.comparisons:
            self._paths[compared.reference] = compared.value.reference
            self._nbytes[compared.reference] = compared.value.reference_file_nbytes

    def file(self, digest: str) -> ModelFile | None:
        """The file, if it is at hand."""
        return self._files.get(digest)

    def path(self, digest: str) -> Path:
        """Where it is, or was when it was measured."""
        file = self._files.get(digest)
        return file.path if file else self._paths[digest]

    def name(self, digest: str) -> str:
        """Its file's name without the ending."""
        path = self.path(digest)
        return words.printable(path.stem if path.suffix == ".gguf" else path.name)

    def names(self, digests: Iterable[str]) -> str:
        """Several names in a row."""
        return ", ".join(sorted(self.name(d) for d in digests))

    def spec(self, digest: str) -> str:
        """What to type to name it."""
        file = self._files.get(digest)
        return file.spec if file else str(self._paths[digest])

    def nbytes(self, digest: str) -> int:
        """Size of its file; 0 if that is not known."""
        file = self._files.get(digest)
        return file.header.nbytes if file and file.header else self._nbytes.get(digest, 0)

    def family(self, digest: str) -> Hashable:
        """What quantizations of one model have in common, and other models do not."""
        file = self._files.get(digest)
        if file is None or file.header is None:
            return words.without_type(self.name(digest))
        keys = file.header.metadata
        architecture, pre = keys.get("general.architecture"), keys.get("tokenizer.ggml.pre")
        return architecture, pre, file.header.parameters

    def title(self, digests: Sequence[str]) -> str:
        """What the models have in common, in words."""
        for file in filter(None, map(self._files.get, digests)):
            if file.header and (name := file.header.metadata.get("general.name")):
                return words.printable(str(name))
        return words.without_type(self.name(digests[-1]))

    def labels(self, digests: Sequence[str]) -> dict[str, str]:
        """Short names that tell these models from each other."""
        short = [words.shortened(n) for n in words.labels([self.name(d) for d in digests])]
        twice = {label for label in short if short.count(label) > 1}
        return {
            digest: f"{label} ({digest[:6]})" if label in twice else label
            for digest, label in zip(digests, short, strict=True)
        }

    def file_name(self, digest: str) -> str:
        """Its file's name."""
        return words.printable(self.path(digest).name)

    def fitting(self, only: Iterable[str] | None) -> list[str]:
        """What to type for these models; for all if none are named."""
        digests = self._files if only is None else only
        return [self.spec(d) for d in chain(digests) if d in self._files or d in self._paths]
