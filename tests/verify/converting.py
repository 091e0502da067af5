"""Many checkpoints converted at the cost of one: what the converter imports takes seconds.

Run as a module: ``python -m tests.verify.converting SCRIPTS CHECKPOINT GGUF ...``.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ggufkit.llamacpp.toolchain import NativeBuild


def convert_all(build: NativeBuild, pairs: Mapping[Path, Path]) -> None:
    """Convert checkpoints to float32 GGUFs, each in a fork of one process.

    Args:
        build: whose converter.
        pairs: checkpoint to GGUF.
    """
    arguments = [str(part) for pair in pairs.items() for part in pair]
    subprocess.run(
        [sys.executable, "-m", "tests.verify.converting", str(build.scripts), *arguments],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )


def main(scripts: str, pairs: list[tuple[str, str]]) -> None:
    sys.path.insert(0, scripts)
    import convert_hf_to_gguf as tool  # type: ignore[import-not-found]
    from conversion import base  # type: ignore[import-not-found]

    from ggufkit.llamacpp import converter
    from tests.architectures import vocabularies
    from tests.architectures.running import _pre_tokenizer

    # The converter knows byte-level tokenizers by a hash over published vocabularies.
    by_hash = base.TextModel.get_vocab_base_pre
    base.TextModel.get_vocab_base_pre = lambda model, tokenizer: (
        _pre_tokenizer(model, tokenizer)
        if vocabularies.RULE in (model.dir_model / "tokenizer_config.json").read_text()
        else by_hash(model, tokenizer)
    )
    for checkpoint, gguf in pairs:
        child = os.fork()
        if child == 0:
            name = Path(checkpoint).name
            options = ["--outfile", gguf, "--outtype", "f32", "--model-name", name]
            task = {"no_mtp": False, "end_tokens": [], "renamed": {}, "dropped": []}
            converter._run(tool, base, {**task, "report": None, "argv": [checkpoint, *options]})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"{checkpoint} was not converted"


if __name__ == "__main__":
    given = sys.argv[2:]
    main(sys.argv[1], list(zip(given[::2], given[1::2], strict=True)))
