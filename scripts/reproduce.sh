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
    "$python" -m modeling_moma train-image-tokenizer --data data/emoji --output runs/tokenizer --resume
[ -e runs/processor/processor_config.json ] ||
    "$python" -m modeling_moma build-processor --data data/emoji --tokenizer runs/tokenizer --output runs/processor
[ -e runs/codes/dataset_dict.json ] ||
    "$python" -m modeling_moma tokenize --data data/emoji --processor runs/processor --output runs/codes
for model in 4t4i dense; do
    # written last, when the run is finished
    [ -e "runs/$model/trainer_state.json" ] ||
        "$python" -m modeling_moma pretrain --processor runs/processor --codes runs/codes --recipe "recipes/emoji-$model.yaml" \
            --attn-implementation eager --output "runs/$model" --resume
done
"$python" scripts/release.py --model runs/4t4i --processor runs/processor --output model_cards/moma-emoji
"$python" scripts/evaluate.py --model model_cards/moma-emoji --baseline runs/dense --curves runs/4t4i runs/dense \
    --temperature 0.7 --guidance-scale 5 --output model_cards/moma-emoji/evaluation.json --write-card
