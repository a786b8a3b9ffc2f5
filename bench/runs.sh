#!/usr/bin/env bash
# The runs behind the figures of notebooks 08, 09 and 12, on all GPUs of this machine:   uv run bench/runs.sh [stage ...]
# Stages, in this order: tune sft updates gsm8k quality ei grpo_lr grpo (which needs LR, the rate that grpo_lr shows to be best). One process a seed,
# dealt out to the GPUs; a finished run is not run again, a killed one continues, so the script can be stopped and started at will.
# TRACK=micro uv run bench/runs.sh sft quality makes the figures of that track on a CPU.
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

sft=cs336_alignment/sft_math_reasoning.py ei=cs336_alignment/sft_math_reasoning_ei.py grpo=cs336_alignment/grpo.py
traces=${TRACES:-data/traces/$track.jsonl}
for stage in "${@:-all}"; do
    begin=$SECONDS
    case $stage in
        all) "$0" tune sft updates gsm8k quality ei; exit ;;
        tune) each_seed tune "${seeds:0:3}" $sft tune --n 1024 ;;
        sft) each_seed sft "$seeds" $sft sweep --keep ;;
        updates)  # few examples for as many updates as all of them get: is it the data, or the patience?
            n=1024 all=704; [ "$track" = micro ] && n=128 all=128
            each_seed updates "$seeds" $sft sweep --size $n --set min_steps=$all --set variant=n${n}_long ;;
        gsm8k) each_seed gsm8k "$seeds" $sft sweep --size 0 --set data=gsm8k --set eval_data=gsm8k --set n_eval=1319 \
                   --set variant=gsm8k --keep ;;
        quality)
            [ -s "$traces" ] || python $sft traces "sft_experiments_$track/n1024_seed0" "$traces" --track "$track"
            each_seed quality "$seeds" $sft quality "$traces" ;;
        ei) each_seed ei "$seeds" $ei sweep ;;
        grpo_lr)
            for lr in 1e-5 2e-5 5e-5; do
                each_seed "grpo_lr$lr" "${seeds:0:1}" $grpo --lr $lr --variant lr$lr --set family=grpo_lr_sweep &
            done; wait ;;
        grpo)
            for data in gsm_symbolic gsm8k; do
                each_seed "grpo_$data" "$seeds" $grpo --lr "${LR:?the learning rate}" --data $data --variant $data
            done ;;
        *) echo "unknown stage $stage; there are: tune sft updates gsm8k quality ei grpo_lr grpo" >&2; exit 2 ;;
    esac
    echo "$stage: $(( SECONDS - begin )) s"
done
