#!/usr/bin/env bash
# Builds, tests and times everything on this machine's GPU, stage by stage, without network: `make bench-gpu`.
# CONTRIBUTING.md says what each stage is, README.md beside this what it leaves and which variables it heeds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ALL=(build tests sanitizer kernels step loader end_to_end cifar)
# Seconds, 530 in all. What a stage leaves of its time the later ones may use; LIMIT_<stage> is kept to the second.
declare -A LIMITS=([build]=90 [tests]=90 [sanitizer]=50 [kernels]=50 [step]=110 [loader]=45 [end_to_end]=35 [cifar]=60)

refuse() {
  echo "bench/gpu.sh: $*" >&2
  exit 2
}

# The stages. Each runs in a bash of its own, in the repository, its output in its log; the first failure ends it unless
# it says otherwise. QUICK and KIND are `--quick` and cpu in a rehearsal, and else nothing and cuda. QUICK and STEP are
# options, none with a space in it.
# shellcheck disable=SC2086

stage_build() {
  if [ "$KIND" = cuda ]; then
    TORCH_CUDA_ARCH_LIST=$CAPABILITY "$PYTHON" setup.py build_ext --inplace
  fi
  "$PYTHON" -m synco_fast doctor
}

stage_tests() {
  local code=0 workers=()
  for name in selftest selftest_half; do # what tests/simt shows on a CPU is worth as much as the two agree
    "$NVCC" -std=c++17 "-arch=sm_${CAPABILITY/./}" -I kernels/cuda "tests/simt/$name.cu" -o "$WORK/$name" || code=$?
    "$WORK/$name" || code=$?
  done
  "$PYTHON" -m pytest -rs tests/ops/test_cuda.py tests/data/test_cuda_view.py || code=$?
  # Triton compiles hundreds of kernels, for which the machine's cores are there.
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  "$PYTHON" -m pytest -rs "${workers[@]}" tests/ops/test_triton*.py || code=$?
  return "$code"
}

# A few tests: each width with all kinds, the one with guarded memory, and views. Without PyTorch's cache of memory,
# memcheck sees the end of each tensor, and not of a block of them. Everything is many times slower: no other time limit.
stage_sanitizer() {
  local code=0
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$(dirname "$NVCC")/compute-sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -o timeout=0 -o faulthandler_timeout=0 tests/ops/test_cuda.py tests/data/test_cuda_view.py \
      -k "exact_arithmetic and 37 and all and not strong or leaks and not triton or random_views and 64" || code=$?
  done
  return "$code"
}

stage_kernels() {
  if [ "$KIND" = cuda ]; then
    "$PYTHON" -m bench.kernels --device cuda --seconds 15 --output "$ROWS"
  else
    "$PYTHON" -m bench.kernels --device cpu --quick --no-memory --only moco_eager,published,cpu --output "$ROWS"
  fi
}

stage_step() {
  "$PYTHON" -m bench.step $STEP --output "$ROWS"
  "$PYTHON" -m bench.step $STEP --ablate --output "$ROWS"
}

stage_loader() {
  local sizes=(--rounds 3 --batches 20)
  if [ -n "$QUICK" ]; then sizes=(--rounds 1 --batches 2 --batch 8 --size 32); fi
  local folder
  folder=$(images "$DATA" data)
  "$PYTHON" -m bench.loader --data "$folder" --device "$KIND" "${sizes[@]}" \
    --only synco_fast,torchvision,dali_chain,read_decode --output "$ROWS"
}

stage_end_to_end() {
  local folder
  folder=$(images "$DATA" data)
  "$PYTHON" -m bench.step $STEP --data "$folder" --output "$ROWS"
}

stage_cifar() {
  local folder
  folder=$(images "$CIFAR" cifar)
  "$PYTHON" -m bench.cifar --data "$folder" --device "$KIND" --method "$METHOD" --epochs "$EPOCHS" $QUICK --output "$ROWS"
}

# images FOLDER-OR-ARCHIVE NAME: the folder of images; an archive is unpacked once. A flat archive, which holds a few hundred
# images, is there 16 times over, by links, or it would be smaller than a batch.
images() {
  local to=$WORK/$2
  if [ ! -f "$1" ]; then
    echo "$1"
    return
  fi
  if [ ! -d "$to" ]; then
    rm -rf "$to.part" && mkdir -p "$to.part/01"
    "$PYTHON" -m tarfile -e "$1" "$to.part/01" >&2
    if [ -z "$(find "$to.part/01" -mindepth 1 -type d -print -quit)" ]; then
      for copy in {02..16}; do cp -al "$to.part/01" "$to.part/$copy"; done
    else
      mv "$to.part/01"/* "$to.part" && rm -rf "$to.part/01"
    fi
    mv "$to.part" "$to"
  fi
  local inside=("$to"/*)
  if [ "${#inside[@]}" = 1 ]; then echo "${inside[0]}"; else echo "$to"; fi
}

# What is asked for.

read -ra ASKED <<<"$(tr ',\n' '  ' <<<"${STAGES:-}")"
for stage in "${ASKED[@]}"; do
  [[ " ${ALL[*]} " = *" $stage "* ]] || refuse "unknown stage '$stage' in STAGES: expected some of ${ALL[*]}"
done
PYTHON=$(command -v "${PYTHON:-python3}") || refuse "there is no Python called '$PYTHON'; name one with PYTHON="
OUT=$(realpath -m "${OUT:-bench/results/gpu-$(date +%F)}")
METHOD=${METHOD:-synco} DATA=${DATA:-} CIFAR=${CIFAR:-} DRY_RUN=${DRY_RUN:-}
NVCC=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
NVCC=$(realpath "${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}")
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PYTHON PYTHONPATH PYTHONUNBUFFERED METHOD DATA CIFAR NVCC
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
if [ -n "$DRY_RUN" ]; then
  KIND=cpu QUICK=--quick EPOCHS=${EPOCHS:-1} STEP="--device cpu --quick" CAPABILITY=none
  "$PYTHON" -c 'import pathlib, sys; from synco_fast.data.procedural import write_demo_set
write_demo_set(pathlib.Path(sys.argv[1]), train=100, val=20)' "$WORK/generated"
  DATA=${DATA:-$WORK/generated} CIFAR=${CIFAR:-$WORK/generated}
else
  KIND=cuda QUICK='' EPOCHS=${EPOCHS:-10} STEP="--device cuda --precision bf16 --seconds 20"
  CAPABILITY=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".")' 2>"$WORK/said") ||
    refuse "no GPU: $(tail -n 1 "$WORK/said"); DRY_RUN=1 rehearses it all on the CPU"
fi
NAME=$("$PYTHON" -c 'import sys; from bench.measure import device_name; print(device_name(sys.argv[1]))' "$KIND")
VERSIONS=$("$PYTHON" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)')
export KIND QUICK EPOCHS CAPABILITY WORK STEP TMPDIR=$WORK
mkdir -p "$OUT"

# What is done.

export -f images "${ALL[@]/#/stage_}"
begin=$SECONDS deadline=0 failed=0 broken='' child='' stage=''

say() { # status, seconds, headline
  printf '%-11s %-13s %4ss  %s\n' "$stage" "$@" | tee -a "$OUT/summary.txt"
}

was_ok() {
  [ -f "$OUT/summary.txt" ] && [ "$(awk -v s="$1" '$1 == s {last = $2} END {print last}' "$OUT/summary.txt")" = ok ]
}

why_not() {
  case $broken$1 in
    broken*) echo "build failed" ;;
    tests | sanitizer) if [ "$KIND" = cpu ]; then echo "no GPU"; fi ;;
    loader | end_to_end) if [ -z "$DATA" ]; then echo "no DATA, which names a folder or an archive of images"; fi ;;
    cifar) if [ -z "$CIFAR" ]; then echo "no CIFAR, which names a folder or an archive of CIFAR-10 as JPEG files"; fi ;;
  esac
}

pack_log() { # at most 8 files may lie in OUT: the logs of finished stages in one
  tar -rf "$OUT/logs.tar" -C "$OUT" "$stage.log" && rm "$OUT/$stage.log"
}

stop() {
  trap '' INT TERM HUP
  if [ -n "$child" ]; then
    kill -TERM "$child" && wait "$child" || true
    say stopped "$((SECONDS - started))" "by a signal"
    pack_log
  fi
  exit 143
}
trap stop INT TERM HUP

run() {
  local own=LIMIT_$stage code=0 hollow='' text status
  deadline=$((deadline + LIMITS[$stage]))
  local seconds=$((deadline - (SECONDS - begin)))
  seconds=${!own:-$((seconds > 5 ? seconds : 5))}
  started=$SECONDS
  rm -f "$OUT/$stage.jsonl" "$OUT/$stage.log"
  ROWS=$OUT/$stage.jsonl timeout --kill-after=10 "$seconds" \
    "$BASH" -c "set -euo pipefail; trap 'exit 143' TERM; stage_$stage" </dev/null >"$OUT/$stage.log" 2>&1 &
  child=$!
  wait "$child" || code=$?
  child=''
  local took=$((SECONDS - started))
  text=$("$PYTHON" -m bench.headline "$stage" "$OUT" "$KIND" "$NAME" "$code") || hollow=yes
  status="failed ($code)"
  if [ "$code" = 124 ] || [ "$code$((took >= seconds))" = 1371 ]; then status="timed out"; fi
  if [ "$code$hollow" = 0 ]; then status=ok; fi
  say "$status" "$took" "$text"
  if [ "$status" != ok ]; then
    failed=1
    if [ "$stage" = build ]; then broken=broken; fi
    tail -n 12 "$OUT/$stage.log" | cut -c 1-160 | sed 's/^/    | /'
  fi
  pack_log
}

echo "# $(date +%FT%T) $NAME, $VERSIONS, $(git describe --always --dirty 2>/dev/null || echo no git)" | tee -a "$OUT/summary.txt"
for stage in "${ALL[@]}"; do
  if [ "${#ASKED[@]}" = 0 ] && was_ok "$stage"; then
    echo "$stage: ok in an earlier run; STAGES=$stage runs it again"
  elif [ "${#ASKED[@]}" = 0 ] || [[ " ${ASKED[*]} " = *" $stage "* ]]; then
    reason=$(why_not "$stage")
    if [ -n "$reason" ]; then
      printf '%-11s skipped: %s\n' "$stage" "$reason" | tee -a "$OUT/summary.txt"
    else
      run
    fi
  fi
done
echo "=== $OUT/summary.txt, after $((SECONDS - begin)) s"
tac "$OUT/summary.txt" | awk '!seen[$1]++' | tac
exit "$failed"
