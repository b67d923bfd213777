#!/usr/bin/env bash
# Trains 4t4i from scratch and from 1t1i seeds of three lengths, two data seeds each at equal training FLOPs, and
# compares them. Needs what scripts/reproduce.sh leaves in runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

for library in /usr/lib/*/libtcmalloc_minimal.so.4; do
    [ -e "$library" ] && export LD_PRELOAD=$library
done

runs=runs/upcycling
data=(--processor runs/processor --tokens runs/tokens)

train() {
    # written last, when the run is finished
    [ -e "$runs/$1/trainer_state.json" ] ||
        "$python" -m modeling_moma pretrain "${data[@]}" --steps 800 --warmup-steps 60 --eval-steps 200 \
            --attn-implementation eager --seed "$seed" --output "$runs/$1" --resume "${@:2}"
}

for seed in 0 1; do
    train "4t4i-$seed" recipes/emoji-plain-4t4i.yaml
    # what its seed would become without upcycling
    train "1t1i-full-$seed" recipes/emoji-plain-1t1i.yaml
    # one seed run gives all three lengths: 5, 10 and 20 % of the steps
    train "1t1i-$seed" recipes/emoji-plain-1t1i.yaml --stop-at 160 --save-steps 40 --save-total-limit 4
    for length in 40 80 160; do
        [ -e "$runs/seed-$length-$seed/upcycling.json" ] || {
            # what a kill has left there would be refused
            rm -rf "$runs/seed-$length-$seed"
            "$python" -m modeling_moma upcycle --model "$runs/1t1i-$seed/checkpoint-$length" --to 4t4i \
                --gumbel-noise-steps 150 --output "$runs/seed-$length-$seed"
        }
        train "4t4i-from-$length-$seed" --model "$runs/seed-$length-$seed"
    done
done
"$python" scripts/compare_upcycling.py "${data[@]}" --split test --scratch $runs/4t4i-{0,1} \
    --upcycled $runs/4t4i-from-{40,80,160}-{0,1} --output benchmarks/reports/upcycling.json
