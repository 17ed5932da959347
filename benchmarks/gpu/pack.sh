#!/usr/bin/env bash
# Fetch what a GPU machine without a network lacks into .gpu/ (ignored by git), and print how large all of it is.
#   bash benchmarks/gpu/pack.sh [SMALL.h5ad]
# That machine has Python 3.12 on x86-64 with torch 2.11 (CUDA 13), accelerate, transformers, numba, tensorstore, h5py,
# pandas, scipy and pytest. SMALL.h5ad: raw counts for the last part (default: the human pancreas of ../shared/data);
# without it that part makes its cells. What travels, the repository included, must stay below 64 MiB.
set -euo pipefail
cd "$(dirname "$0")/../.."

wheels=(
    anndata==0.13.4 zarr==3.4.2 numcodecs donfig google-crc32c array-api-compat legacy-api-wrap natsort session-info2
    scverse-misc pydantic-settings python-dotenv msgspec dask distributed partd locket tblib zict msgpack tornado
    pydantic annotated-types typing-inspection typing-extensions beartype
    hjson py-cpuinfo einops
)
tags=()
for tag in manylinux_2_{34,31,28,27,24,17,12,5} manylinux2014 manylinux2010 manylinux1; do tags+=(--platform "${tag}_x86_64"); done
fetch() { python3 -m pip download -q --no-deps -d .gpu/wheels "$@" 2> >(grep -v 'is ignored' >&2); }

rm -rf .gpu && mkdir -p .gpu/wheels
fetch --only-binary=:all: --python-version 3.12 --implementation cp "${tags[@]}" "${wheels[@]}"
core=$(unzip -p .gpu/wheels/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: *pydantic-core *\(==[0-9.]*\).*/\1/p') # to the digit
fetch --only-binary=:all: --python-version 3.12 --implementation cp "${tags[@]}" "pydantic-core$core"
# DeepSpeed is published as source: it is built on that machine, beside its torch, without compiling any operation
DS_BUILD_OPS=0 fetch --no-binary=:all: 'deepspeed>=0.16'

small=${1:-../shared/data/baron_pancreas_human.h5ad}
if [[ -f $small ]]; then cp "$small" .gpu/small.h5ad; else echo "no $small: the last part makes its cells" >&2; fi

ls -l .gpu/wheels | awk 'NR > 1 { printf "%8.2f MiB  %s\n", $5 / 1048576, $9 }'
total=$({ git ls-files -z --cached --others --exclude-standard | xargs -0 -r stat -c %s 2>/dev/null; find .gpu -type f -printf '%s\n'; } \
    | awk '{ n += $1 } END { printf "%d", n / 1048576 + 1 }')
echo "$total MiB travel in all (64 may)"
((total < 64))
