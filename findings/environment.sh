# Sourced by the scripts of this folder; README.md tells how they are run.
#
#   need REQUIREMENT...          sets $python: an interpreter with exactly these packages
#   beside NAME REQUIREMENT...   other versions, without what they depend on, in $work/NAME
#   llama_cpp_scripts            sets $llama_cpp: llama.cpp's scripts of llama-cpp-python 0.3.36
#   compare                      prints what comes in, and fails unless it is what the
#                                head of the script says after "#> "
#
# $work is a folder of the script's own, which is removed at the end.

set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
export TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=

need() {
    if [ -n "${FINDINGS_PYTHON:-}" ]; then
        python=$FINDINGS_PYTHON
    else
        echo "installing $*" >&2
        python3 -m venv "$work/venv"
        python=$work/venv/bin/python
        "$python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
    "$python" - "$@" <<'END'
import sys
from importlib.metadata import version

for requirement in sys.argv[1:]:
    name, wanted = requirement.split("==")
    found = version(name).partition("+")[0]
    if found != wanted:
        sys.exit(f"{name} is {found}, not {wanted}: {sys.executable}")
END
}

beside() {
    folder=$work/$1
    shift
    echo "installing $*" >&2
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$@"
}

llama_cpp_scripts() {
    llama_cpp=${FINDINGS_LLAMA_CPP:-}
    if [ -z "$llama_cpp" ]; then
        echo "fetching the source of llama-cpp-python 0.3.36 (77 MB)" >&2
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
            --no-binary llama-cpp-python --dest "$work" llama-cpp-python==0.3.36
        tar -xzf "$work/llama_cpp_python-0.3.36.tar.gz" -C "$work"
        llama_cpp=$work/llama_cpp_python-0.3.36/vendor/llama.cpp
    fi
    [ -f "$llama_cpp/convert_hf_to_gguf.py" ] || {
        echo "there is no convert_hf_to_gguf.py in $llama_cpp" >&2
        exit 1
    }
}

compare() {
    sed -n 's/^#> \{0,1\}//p' "$0" >"$work/expected"
    tee "$work/found"
    if ! diff -u "$work/expected" "$work/found" >&2; then
        [ ! -f "$work/stderr" ] || tail -n 20 "$work/stderr" >&2
        echo "$(basename "$0"): another behaviour than the one that is described" >&2
        exit 1
    fi
}
