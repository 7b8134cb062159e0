#!/usr/bin/env bash
# Builds, tests and times everything on this machine's GPU, stage by stage, without network: `make bench-gpu`.
# CONTRIBUTING.md says what each stage is, README.md beside this what it leaves and which variables it heeds.
# shellcheck disable=SC2054,SC2086,SC2329  # lists with commas; options without spaces; stages are called by name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ALL=(build tests sanitizer kernels step loader end_to_end cifar ablation)
# Seconds, 530 in all. What a stage leaves of its time the later ones may use; LIMIT_<stage> is kept to the second.
declare -A LIMITS=([build]=60 [tests]=65 [sanitizer]=35 [kernels]=35 [step]=115 [loader]=40 [end_to_end]=50 [cifar]=50
  [ablation]=80)

# The stages, each in a bash of its own; what fails ends one, unless it says otherwise. In a rehearsal KIND is cpu, and
# QUICK is --quick; else cuda, and empty.

stage_build() {
  if [ "$KIND" = cuda ]; then TORCH_CUDA_ARCH_LIST=$CAPABILITY "$PYTHON" setup.py build_ext --inplace; fi
  "$PYTHON" -m synco_fast doctor
}

stage_tests() {
  local code=0 workers=()
  for name in selftest selftest_half; do # what tests/simt shows on a CPU is worth as much as the two agree
    "$NVCC" -std=c++17 "-arch=sm_${CAPABILITY/./}" -I kernels/cuda "tests/simt/$name.cu" -o "$WORK/$name" || code=$?
    "$WORK/$name" || code=$?
  done
  "$PYTHON" -m pytest -rs tests/ops/test_cuda.py tests/ops/test_phases.py tests/data/test_cuda_view.py \
    tests/engine/test_step_cuda.py || code=$?
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi # Triton compiles hundreds of kernels
  "$PYTHON" -m pytest -rs "${workers[@]}" tests/ops/test_triton*.py || code=$?
  return "$code"
}

# A few tests: each width with all kinds, the one with guarded memory, and views. Without PyTorch's cache of memory,
# memcheck sees the end of each tensor, and not of a block of them. All is many times slower: no other time limit.
stage_sanitizer() {
  local code=0
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -o timeout=0 -o faulthandler_timeout=0 tests/ops/test_cuda.py tests/data/test_cuda_view.py \
      -k "exact_arithmetic and 37 and all and not strong or leaks and not triton or random_views and 64" || code=$?
  done
  return "$code"
}

stage_kernels() {
  local options=(--seconds 15)
  if [ -n "$QUICK" ]; then options=(--quick --no-memory --only moco_eager,published,cpu); fi
  "$PYTHON" -m bench.kernels --device "$KIND" "${options[@]}" --output "$ROWS"
}

stage_step() {
  "$PYTHON" -m bench.step $STEP --output "$ROWS"
}

stage_loader() {
  local options=(--rounds 6 --batches 10)
  if [ -n "$QUICK" ]; then options=(--rounds 1 --batches 2 --batch 8 --size 32); fi
  unpack "$DATA" data
  "$PYTHON" -m bench.loader --data "$FOLDER" --device "$KIND" "${options[@]}" \
    --only synco_fast,torchvision,dali_chain,read_decode --output "$ROWS"
}

stage_end_to_end() {
  unpack "$DATA" data
  "$PYTHON" -m bench.step $STEP --seconds 20 --only synco --data "$FOLDER" --output "$ROWS"
}

stage_cifar() {
  unpack "$CIFAR" cifar
  "$PYTHON" -m bench.cifar --data "$FOLDER" --device "$KIND" --method "$METHOD" --epochs "$EPOCHS" \
    $QUICK --output "$ROWS"
}

stage_ablation() { "$PYTHON" -m bench.step $STEP --only synco --ablate --output "$ROWS"; }

# unpack FOLDER-OR-ARCHIVE NAME: sets FOLDER to the folder of images; an archive is unpacked once. What a flat archive
# holds is there 16 times over, as links: a few hundred images are less than a batch.
unpack() {
  FOLDER=$1
  if [ ! -f "$1" ]; then return; fi
  FOLDER=$WORK/$2
  if [ ! -d "$FOLDER" ]; then
    rm -rf "$FOLDER.part" "$FOLDER.copies"
    "$PYTHON" -m tarfile -e "$1" "$FOLDER.part"
    if [ -z "$(find "$FOLDER.part" -mindepth 1 -type d -print -quit)" ]; then
      mkdir "$FOLDER.copies"
      for copy in {01..16}; do cp -al "$FOLDER.part" "$FOLDER.copies/$copy"; done
      rm -rf "$FOLDER.part" && mv "$FOLDER.copies" "$FOLDER.part"
    fi
    mv "$FOLDER.part" "$FOLDER"
  fi
  local inside=("$FOLDER"/*)
  if [ "${#inside[@]}" = 1 ]; then FOLDER=${inside[0]}; fi
}

# What is asked for, and where.
refuse() { echo "bench/gpu.sh: $*" >&2 && exit 2; }

read -ra ASKED <<<"$(tr ',\n' '  ' <<<"${STAGES:-}")"
for stage in "${ASKED[@]}"; do
  [[ " ${ALL[*]} " = *" $stage "* ]] || refuse "unknown stage '$stage' in STAGES: expected some of ${ALL[*]}"
done
METHOD=${METHOD:-synco} DATA=${DATA:-} CIFAR=${CIFAR:-} EPOCHS=${EPOCHS:-10} KIND=cuda QUICK='' CAPABILITY=''
[[ $METHOD =~ ^(moco|mochi|synco)$ ]] || refuse "METHOD=$METHOD: expected moco, mochi or synco"
[[ $EPOCHS =~ ^[1-9][0-9]*$ ]] || refuse "EPOCHS=$EPOCHS: expected a number above 0"
command -v "${PYTHON:=python3}" >/dev/null || refuse "there is no Python called '$PYTHON'; name one with PYTHON="
NVCC=${CUDA_HOME:+$CUDA_HOME/bin/nvcc} TOOLKIT=${CUDA_HOME:-/usr/local/cuda}/bin
NVCC=${NVCC:-$(command -v nvcc || echo "$TOOLKIT/nvcc")}
SANITIZER=$(command -v compute-sanitizer || echo "$TOOLKIT/compute-sanitizer")
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 STEP="--device cuda --precision bf16 --steps 2 --seconds 40"
WORK=$(mktemp -d)
export PYTHON PYTHONPATH PYTHONUNBUFFERED METHOD DATA CIFAR EPOCHS KIND QUICK STEP CAPABILITY NVCC SANITIZER WORK
trap 'rm -rf "$WORK"' EXIT
if [ -n "${DRY_RUN:-}" ]; then
  KIND=cpu QUICK=--quick EPOCHS=1 STEP="--device cpu --quick"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads that wait for busy cores take minutes
  [ -n "$DATA" ] && [ -n "$CIFAR" ] || "$PYTHON" -c 'import pathlib, sys; from synco_fast.data import procedural
procedural.write_demo_set(pathlib.Path(sys.argv[1]), train=100, val=20)' "$WORK/generated"
  DATA=${DATA:-$WORK/generated} CIFAR=${CIFAR:-$WORK/generated} OUT=${OUT:-runs/gpu-rehearsal-$(date +%F)}
else
  CAPABILITY=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".")' 2>"$WORK/said") ||
    refuse "no GPU: $(tail -n 1 "$WORK/said") -- DRY_RUN=1 rehearses it all on the CPU"
fi
NAME=$("$PYTHON" -c 'import sys; from bench.measure import device_name; print(device_name(sys.argv[1]))' "$KIND")
OUT=$(realpath -m "${OUT:-bench/results/gpu-$(date +%F)}")
mkdir -p "$OUT" && SUMMARY=$OUT/summary.txt
if [ -f "$SUMMARY" ] && ! grep -qF " $NAME, " "$SUMMARY"; then
  refuse "$OUT holds a run on another device than $NAME; choose another OUT="
fi

# What is done.
export TMPDIR=$WORK
# What a stage has compiled, the others and the next run need not.
export TORCHINDUCTOR_CACHE_DIR=$PWD/build/compiled/inductor TRITON_CACHE_DIR=$PWD/build/compiled/triton
export -f unpack "${ALL[@]/#/stage_}"
begin=$SECONDS deadline=$SECONDS failed=0 broken='' running='' stage=''

say() { printf '%-11s %-13s %4ss  %s\n' "$stage" "$@" | tee -a "$SUMMARY"; } # status, seconds, headline

why_not() {
  case $broken$1 in
    broken*) echo "build failed" ;;
    tests | sanitizer) if [ "$KIND" = cpu ]; then echo "no GPU"; fi ;;
    loader | end_to_end) if [ -z "$DATA" ]; then echo "no DATA=, a folder or an archive of images"; fi ;;
    cifar) if [ -z "$CIFAR" ]; then echo "no CIFAR=, a folder or an archive of CIFAR-10 as JPEG files"; fi ;;
  esac
}

pack_log() { # a lent machine gives back 8 files, so the logs of finished stages are one
  if tar -rf "$OUT/logs.tar" -C "$OUT" "$stage.log"; then rm "$OUT/$stage.log"; fi
}

stop() {
  trap '' INT TERM HUP
  local child=${!:-} # even where the signal came before `run` could note it
  if [ -n "$running" ] && [ -n "$child" ]; then
    kill -TERM -- "-$child" 2>/dev/null || kill -TERM "$child" || true # timeout alone may forget whom it started
    for _ in {1..50}; do if kill -0 -- "-$child" 2>/dev/null; then sleep 0.2; fi; done
    kill -KILL -- "-$child" 2>/dev/null || kill -KILL "$child" 2>/dev/null || true
    say stopped "$((SECONDS - started))" "by a signal"
    pack_log
  fi
  exit 143
}
trap stop INT TERM HUP

run() {
  local own=LIMIT_$stage code=0 hollow='' status text took
  deadline=$((deadline + LIMITS[$stage]))
  local seconds=${!own:-$((deadline - SECONDS > 5 ? deadline - SECONDS : 5))}
  rm -f "$OUT/$stage.jsonl"
  started=$SECONDS running=yes
  ROWS=$OUT/$stage.jsonl timeout --kill-after=10 "$seconds" \
    "$BASH" -c "set -euo pipefail; trap 'exit 143' TERM; stage_$stage" </dev/null >"$OUT/$stage.log" 2>&1 &
  wait "$!" || code=$?
  kill -KILL -- "-$!" 2>/dev/null || true # what is left of it would disturb the next
  running='' took=$((SECONDS - started))
  text=$("$PYTHON" -m bench.headline "$stage" "$OUT" "$KIND" "$NAME" "$code") || hollow=yes
  status="failed ($code)"
  if [ "$code$hollow" = 0 ]; then status=ok; fi
  if ((code == 124 || (code == 137 && took >= seconds))); then status="timed out"; fi
  say "$status" "$took" "$text"
  if [ "$status" != ok ]; then
    failed=1
    if [ "$stage" = build ]; then broken=broken; fi
    tail -n 12 "$OUT/$stage.log" | cut -c 1-160 | sed 's/^/    | /'
  fi
  pack_log
}

echo "# $(date +%FT%T) $NAME, $(git describe --always --dirty 2>/dev/null || echo no git)" | tee -a "$SUMMARY"
for stage in "${ALL[@]}"; do
  last=$(awk -v stage="$stage" '$1 == stage {last = $2} END {print last}' "$SUMMARY")
  if [ "${#ASKED[@]}$last" = 0ok ]; then
    echo "$stage: ok in an earlier run; STAGES=$stage runs it again"
  elif [ "${#ASKED[@]}" = 0 ] || [[ " ${ASKED[*]} " = *" $stage "* ]]; then
    reason=$(why_not "$stage")
    if [ -z "$reason" ]; then run; else printf '%-11s skipped: %s\n' "$stage" "$reason" | tee -a "$SUMMARY"; fi
  fi
done
echo "=== $SUMMARY, after $((SECONDS - begin)) s"
tac "$SUMMARY" | awk '!seen[$1 == "#" ? $0 : $1]++' | tac
exit "$failed"
