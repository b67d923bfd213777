#!/usr/bin/env bash
# Trains the recipe of the released model for a short time without and with depth layers, three seeds each at equal
# FLOPs, and compares them. Needs what scripts/reproduce.sh leaves in runs/; some hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

for library in /usr/lib/*/libtcmalloc_minimal.so.4; do
    [ -e "$library" ] && export LD_PRELOAD=$library
done

data=(--processor runs/processor --tokens runs/tokens)
# a step with depth costs 1.029 of one without
for run in 4t4i:emoji:1200 mod-4t4i:emoji-mod-4t4i:1166; do
    IFS=: read -r name recipe steps <<< "$run"
    for seed in 0 1 2; do
        folder=runs/depth/$name-$seed
        # written last, when the run is finished
        [ -e "$folder/trainer_state.json" ] ||
            "$python" -m modeling_moma pretrain "recipes/$recipe.yaml" "${data[@]}" --steps "$steps" \
                --seed "$seed" --eval-steps "$steps" --attn-implementation eager --output "$folder" --resume
    done
done
"$python" scripts/compare_depth.py "${data[@]}" --split test --models runs/depth/4t4i-{0,1,2} \
    --depth runs/depth/mod-4t4i-{0,1,2} --output model_cards/moma-emoji/depth_comparison.json
"$python" scripts/depth_noise.py "${data[@]}" --split validation --models runs/depth/mod-4t4i-{0,1,2} \
    --baseline runs/depth/4t4i-{0,1,2} --output benchmarks/reports/depth-noise.json
"$python" scripts/write_card.py --model model_cards/moma-emoji
