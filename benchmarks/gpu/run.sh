#!/usr/bin/env bash
# What only a GPU can show, in one call of at most nine minutes; a part that fails or hangs costs its own time alone.
#   bash benchmarks/gpu/run.sh              in the root of the repository, on a machine with an NVIDIA GPU
#   bash benchmarks/gpu/run.sh --dry        every part small, on a CPU, in under three minutes
#   bash benchmarks/gpu/run.sh --only train launchers
# Without a network there: first, here, bash benchmarks/gpu/pack.sh, and take .gpu/ along.
# Results: $OUT (default benchmarks/gpu): results.json, RESULTS.md, trace.json.gz, log.txt, written after each part.
set -uo pipefail
cd "$(dirname "$0")/../.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -d .gpu/wheels ]]; then
    site=$(mktemp -d)/site
    quiet=(-q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check --upgrade --target "$site")
    python3 -m pip install "${quiet[@]}" .gpu/wheels/*.whl || echo "run.sh: some wheels could not be installed" >&2
    export PYTHONPATH="$PYTHONPATH:$site"
    for source in .gpu/wheels/deepspeed-*.tar.gz; do
        [[ -f $source ]] && { DS_BUILD_OPS=0 python3 -m pip install "${quiet[@]}" --no-build-isolation "$source" \
            || echo "run.sh: DeepSpeed could not be built" >&2; }
    done
fi
exec python3 benchmarks/gpu/run.py "$@"
