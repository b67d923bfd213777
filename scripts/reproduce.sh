#!/usr/bin/env bash
# Trains the released model from nothing and rewrites its card. Some hours on two cores; `runs/` keeps every stage,
# and a killed stage goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# glibc hands large tensors back to the system after every step; tcmalloc keeps them, where it is installed
# (Debian: libtcmalloc-minimal4)
for library in /usr/lib/*/libtcmalloc_minimal.so.4; do
    [ -e "$library" ] && export LD_PRELOAD=$library
done

[ -e runs/tokenizer/model.safetensors ] ||
    "$python" -m modeling_moma train-image-tokenizer recipes/emoji.yaml --output runs/tokenizer --resume
[ -e runs/processor/processor_config.json ] ||
    "$python" -m modeling_moma build-processor recipes/emoji.yaml --image-tokenizer runs/tokenizer --output runs/processor
[ -e runs/tokens/manifest.json ] ||
    "$python" -m modeling_moma tokenize recipes/emoji.yaml --processor runs/processor --output runs/tokens
for run in 4t4i:emoji dense:emoji-dense; do
    # written last, when the run is finished
    [ -e "runs/${run%:*}/trainer_state.json" ] ||
        "$python" -m modeling_moma pretrain "recipes/${run#*:}.yaml" --processor runs/processor --tokens runs/tokens \
            --attn-implementation eager --output "runs/${run%:*}" --resume
done
"$python" scripts/release.py --model runs/4t4i --processor runs/processor \
    --draw-temperature 0.7 --draw-guidance 5 --output model_cards/moma-emoji
"$python" scripts/evaluate_emoji.py --model model_cards/moma-emoji --baseline runs/dense --curves runs/4t4i runs/dense \
    --temperature 0.7 --guidance-scale 5 --output model_cards/moma-emoji/evaluation.json --write-card
