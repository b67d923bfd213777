#!/usr/bin/env bash
# Grows experts from a converted SmolLM2 in several forms, and trains each for 50 steps on pictures, pages and texts: what
# the switch costs, and what it costs to get back. Needs runs/smollm2-moma of scripts/reproduce_smollm2.sh, and what
# `make data-gloss data-manual` builds; an hour and a half of a core.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
moma=("$python" -m modeling_moma)

for library in /usr/lib/*/libtcmalloc_minimal.so.4; do
    [ -e "$library" ] && export LD_PRELOAD=$library
done

start=runs/smollm2-moma
runs=runs/smollm2-upcycling
"${moma[@]}" tokenize recipes/smollm2-mixture.yaml --processor "$start" --output "$runs/tokens"

train() {
    # written last, when the run is finished; the losses are in it
    [ -e "$runs/$1/trainer_state.json" ] ||
        "${moma[@]}" pretrain recipes/smollm2-mixture.yaml --model "$2" --restart-data --processor "$start" \
            --tokens "$runs/tokens" --attn-implementation eager --logging-steps 5 --eval-steps 10 --eval-examples 48 \
            --save-steps 1000 --output "$runs/$1"
}

grow() {
    [ -e "$runs/seed-$1/upcycling.json" ] ||
        "${moma[@]}" upcycle --model "$start" --gumbel-noise-steps 50 --output "$runs/seed-$1" "${@:2}"
    train "$1" "$runs/seed-$1"
}

train 1t1i "$start"
grow 4t4i-kept --to 4t4i --keep-seed --expert-intermediate-size 384
grow 4t4i-preserved --to 4t4i --preserve-function
grow 1t4i
grow 4t4i --to 4t4i
