#!/usr/bin/env bash
# The runs behind the figures of notebooks 08 and 09, on all GPUs of this machine:   uv run bench/pocket_runs.sh [stage ...]
# Stages, in this order: tune sft gsm8k quality ei. One process a seed, dealt out to the GPUs; a finished run is not run again, a killed
# one continues, so that the script can be stopped and started at will. TRACK=micro SEEDS=0 tries it in minutes on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
track=${TRACK:-pocket} seeds=${SEEDS:-0 1 2 3} share=${GPU_SHARE:-0.12} logs=${LOGS:-results/logs}
gpus=$( (nvidia-smi -L 2> /dev/null || true) | wc -l)
mkdir -p "$logs"

each_seed() {  # NAME SEEDS COMMAND...: the command once for each seed, side by side; fails if one fails
    local name=$1 s pids=() failed=0; local -a todo=($2); shift 2
    for s in "${todo[@]}"; do
        CUDA_VISIBLE_DEVICES=$(( gpus ? s % gpus : 0 )) python "$@" --track "$track" --seed "$s" \
            --gpu-memory-utilization "$share" > "$logs/$name-$s.log" 2>&1 &
        pids+=($!)
    done
    for s in "${!pids[@]}"; do wait "${pids[$s]}" || { failed=1; tail -5 "$logs/$name-${todo[$s]}.log" >&2; }; done
    return $failed
}

sft=cs336_alignment/sft_math_reasoning.py ei=cs336_alignment/sft_math_reasoning_ei.py
traces=${TRACES:-data/traces/$track.jsonl}
for stage in "${@:-all}"; do
    begin=$SECONDS
    case $stage in
        all) "$0" tune sft gsm8k quality ei; exit ;;
        tune) each_seed tune "${seeds:0:3}" $sft tune --n 1024 ;;
        sft) each_seed sft "$seeds" $sft sweep --keep ;;
        gsm8k) each_seed gsm8k "$seeds" $sft sweep --size 0 --set data=gsm8k --set eval_data=gsm8k --set n_eval=1319 \
                   --set variant=gsm8k --keep ;;
        quality)
            [ -s "$traces" ] || python $sft traces "sft_experiments_$track/n1024_seed0" "$traces" --track "$track"
            each_seed quality "$seeds" $sft quality "$traces" ;;
        ei) each_seed ei "$seeds" $ei sweep ;;
        *) echo "unknown stage $stage; there are: tune sft gsm8k quality ei" >&2; exit 2 ;;
    esac
    echo "$stage: $(( SECONDS - begin )) s"
done
