#!/usr/bin/env bash
# Makes a MoMa of SmolLM2-135M-Instruct as docs/start-from-a-text-model.md tells, and measures what it knows of text and
# of pictures before and after. Needs `pip`, and what `make data-gloss data-manual` builds; two to three hours of a core.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
moma=("$python" -m modeling_moma)

for library in /usr/lib/*/libtcmalloc_minimal.so.4; do
    [ -e "$library" ] && export LD_PRELOAD=$library
done

source=runs/smollm2
start=runs/smollm2-moma
tokens=runs/smollm2-tokens
reports=benchmarks/reports/smollm2
mkdir -p "$reports"
gguf=$("$python" scripts/fetch_smollm2.py --output "$source")
[ -e "$start" ] || "${moma[@]}" convert llama --source "$source" --gguf-file "$(basename "$gguf")" \
    --processor model_cards/moma-emoji --output "$start"
"${moma[@]}" tokenize recipes/smollm2-emoji.yaml --processor "$start" --output "$tokens"

train() {
    # written last, when the run is finished
    [ -e "runs/$1/trainer_state.json" ] ||
        "${moma[@]}" pretrain recipes/smollm2-emoji.yaml --processor "$start" --tokens "$tokens" \
            --attn-implementation eager --logging-steps 20 --eval-steps 250 --save-steps 250 --eval-examples 100 \
            --output "runs/$1" "${@:2}"
}

# the picture side alone
train smollm2-pictures --model "$start" --train-groups image
# when no picture comes: some steps among other texts
mixture=runs/smollm2-upcycling/tokens
"${moma[@]}" tokenize recipes/smollm2-mixture.yaml --processor "$start" --output "$mixture"
[ -e runs/smollm2-kept/trainer_state.json ] ||
    "${moma[@]}" pretrain recipes/smollm2-mixture.yaml --model runs/smollm2-pictures --restart-data --train-groups image \
        --steps 30 --learning-rate 3e-4 --warmup-steps 3 --processor "$start" --tokens "$mixture" \
        --attn-implementation eager --logging-steps 5 --eval-steps 30 --eval-examples 32 --output runs/smollm2-kept
# or everything, by full weights and by adapters
further=(--model runs/smollm2-pictures --restart-data --steps 120 --learning-rate 1e-4 --warmup-steps 10)
train smollm2-emoji "${further[@]}"
train smollm2-lora "${further[@]}" --lora-rank 16

# the released model's recipe for as many examples
emoji=runs/emoji-tokens
"${moma[@]}" tokenize recipes/smollm2-emoji.yaml --processor model_cards/moma-emoji --output "$emoji"
[ -e runs/emoji-short/trainer_state.json ] ||
    "${moma[@]}" pretrain recipes/emoji.yaml --processor model_cards/moma-emoji --tokens "$emoji" --steps 870 \
        --batch-size 16 --attn-implementation eager --eval-steps 435 --eval-examples 100 --output runs/emoji-short

for name in smollm2-moma smollm2-pictures smollm2-kept smollm2-emoji smollm2-lora; do
    "$python" scripts/text_ability.py --model "runs/$name" --output "$reports/$name-text.json"
done
for name in smollm2-emoji emoji-short; do
    "$python" scripts/evaluate.py --model "runs/$name" --limit 200 --output "$reports/$name-pictures.json"
done
"$python" scripts/contact_sheet.py --model runs/smollm2-emoji --output docs/images/smollm2-emoji.png
