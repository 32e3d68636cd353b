#!/usr/bin/env bash
# All that is to be measured on one GPU, in at most ten minutes, on a machine that reaches no network:
#
#     bash benchmarks/gpu.sh OUT [PART...]        parts: check attention speed shakespeare ladder, which run without
#                                                 any; and mesh adapters, which take five minutes more
#
# Nothing is installed but the wheels of a folder, if one is named; the package is this checkout. What the machine lacks
# of `dependencies` in pyproject.toml, and transformers, travels so: `pip download --no-deps -d FOLDER flax optax ...`
# where there is a network, with the Python version of that machine. OUT gets a log of each part, speed.json,
# BENCHMARKS.md with the block of this GPU, and the runs. A run that was cut short goes on where it stopped when its
# part is asked for again.
#
#     PYTHON=python3     the interpreter that holds jax, flax, optax, orbax-checkpoint, torch and transformers
#     WHEELS=FOLDER      wheels of what it lacks
#     ANY_JAX=1          takes a jax that pyproject.toml excludes: whether it sums rightly, the canary decides
#     ALSO="FIELD=VALUE ..."   measures jaxformer's step with each of these, too, such as another attention
#     JAXFORMER_DATA     the folder that holds tinyshakespeare.txt
#     SMALL=1            tiny sizes, to try this script on a CPU
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?which folder gets what is found?}" && cd "$1" && pwd)
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(check attention speed shakespeare ladder)
python=${PYTHON:-python3}

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl || exit 2
fi
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL=3 ANY_JAX="${ANY_JAX:-}"
export JAX_COMPILATION_CACHE_DIR="$out/compiled" JAXFORMER_CACHE="$out/cache"

quick=() few=() also=()
if [ -n "${SMALL:-}" ]; then
    quick=(--quick)
    few=(--train.steps=20 --train.eval_every=10 --train.save_every=10 --train.sample_tokens=20
        --train.compute_dtype=float32 --model.n_layers=1 --model.d_model=24 --model.context_length=32
        --data.batch_size=64 --data.valid_tokens=2000)
fi
for each in ${ALSO:-}; do also+=(--also "$each"); done

within() { timeout --kill-after=10 "$@"; } # SIGTERM: a run saves before it ends

check() {
    within 30 "$python" - << 'PYTHON'
import os, tomllib
from importlib import metadata

import jax
from packaging.requirements import Requirement

from jaxformer.platform import prepare

needs = map(Requirement, tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])
wanted = next(each.specifier for each in needs if each.name == "jax")
print(f"jax {jax.__version__}, torch {metadata.version('torch')}, {jax.devices()[0].device_kind}")
if jax.__version__ not in wanted and not os.environ["ANY_JAX"]:
    raise SystemExit(f"jax must be {wanted}; ANY_JAX=1 leaves it to the canary")
prepare()
print("the canary's sums are right")
PYTHON
}

attention() { within 40 "$python" benchmarks/attention.py; } # implementations compared, with gradients

speed() {
    within 330 "$python" benchmarks/compare.py gpu "${quick[@]}" "${also[@]}" --within=320 --json="$out/speed.json" \
        --markdown="$out/BENCHMARKS.md"
}

trained() {
    within "$1" "$python" -m jaxformer train "$2" "${few[@]}" --directory="$out/$2"
    local status=$?
    within 20 "$python" -m jaxformer evaluate "$out/$2" --step=best --json || [ $status -ne 0 ] || status=$?
    return $status
}

shakespeare() { trained 100 shakespeare_gpu; }
ladder() { trained 90 ladder_scaled; }

state_of() { within 30 "$python" -m jaxformer inspect "$1" --json | grep -o '"state_sha256": "[0-9a-f]*"'; }

mesh() { # a mesh of one device gives the bits of the plain path
    local steps=(--train.steps=40 --train.eval_every=40 --train.save_every=40 --train.sample_tokens=0)
    within 60 "$python" -m jaxformer train shakespeare_gpu "${few[@]}" "${steps[@]}" --directory="$out/plain" || return 1
    within 60 "$python" -m jaxformer train shakespeare_gpu "${few[@]}" "${steps[@]}" --directory="$out/forced" \
        --mesh.forced=true || return 1
    local plain forced
    plain=$(state_of "$out/plain") && forced=$(state_of "$out/forced") && echo "plain $plain, forced $forced"
    [ -n "$plain" ] && [ "$plain" = "$forced" ]
}

adapters() {
    local sizes=(--rows=8 --tokens=1024 --dtype=bfloat16)
    [ -z "${SMALL:-}" ] || sizes=(--rows=2 --tokens=32 --small)
    within 240 "$python" benchmarks/adapters.py "${sizes[@]}"
}

failed=0
for part in "${parts[@]}"; do
    [[ $part =~ ^(check|attention|speed|shakespeare|ladder|mesh|adapters)$ ]] || { echo "$part: there is no such part" >&2; exit 2; }
    began=$SECONDS
    echo "== $part"
    "$part" > "$out/$part.log" 2>&1
    status=$?
    tail -n 40 "$out/$part.log"
    echo "== $part: exit status $status after $((SECONDS - began)) s"
    [ $status -eq 0 ] || failed=1
    [ "$part" = check ] && [ $status -ne 0 ] && exit 2
done
exit $failed
