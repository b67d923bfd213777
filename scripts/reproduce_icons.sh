#!/usr/bin/env bash
# Trains the model of icons from nothing and rewrites its card. Some hours on two cores; `runs/icons` keeps every stage,
# and a killed stage goes on from its last checkpoint. STEPS=20 tries all of it in `runs/icons-short`, with
# trainings of so many steps and few icons measured, and leaves the released model alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
runs=runs/icons recipes=recipes release=model_cards/moma-icons short=() tokenizer_short=() few=()
if [ -n "${STEPS:-}" ]; then
    runs=runs/icons-short recipes=runs/icons-short/recipes release=runs/icons-short/release
    short=("trainer.max_steps=$STEPS") tokenizer_short=(--set "image_tokenizer.steps=$STEPS")
    few=(--limit 24 --train-images 2000)
    mkdir -p $recipes
    for recipe in recipes/moma-icons*.yaml; do
        sed "s:runs/icons/:$runs/:" "$recipe" > "$recipes/${recipe##*/}"
    done
fi
recipe=$recipes/moma-icons.yaml

# without it a sample of the icons would be trained on
if ! compgen -G "data/icons/data/train-00000-of-*.parquet" > /dev/null; then
    echo "data/icons has a sample of its icons alone: \`make data\` first" >&2
    exit 1
fi

# glibc hands large tensors back to the system after every step; tcmalloc keeps them, where it is installed
# (Debian: libtcmalloc-minimal4)
for library in /usr/lib/*/libtcmalloc_minimal.so.4; do
    [ -e "$library" ] && export LD_PRELOAD=$library
done

[ -e $runs/tokenizer/model.safetensors ] ||
    "$python" -m modeling_moma train-image-tokenizer $recipe --output $runs/tokenizer "${tokenizer_short[@]}" --resume
[ -e $runs/processor/processor_config.json ] ||
    "$python" -m modeling_moma build-processor $recipe --image-tokenizer $runs/tokenizer --output $runs/processor
[ -e $runs/tokens/manifest.json ] ||
    "$python" -m modeling_moma tokenize $recipe --processor $runs/processor --output $runs/tokens
# the released model was trained by PROCESSES=2 of one thread each, which take the same steps in less time
launcher=() rows=16 processes=${PROCESSES:-1}
if [ "$processes" -gt 1 ]; then
    launcher=(-m torch.distributed.run --standalone --nproc-per-node "$processes")
    rows=$((rows / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
# written last, when the run is finished
[ -e $runs/model/trainer_state.json ] ||
    "$python" "${launcher[@]}" -m modeling_moma pretrain $recipe --processor $runs/processor \
        --tokens $runs/tokens --output $runs/model --resume \
        --set trainer.per_device_train_batch_size=$rows "${short[@]}"
# it names icons well enough to choose those that are to be drawn
[ -e $runs/typical/train.parquet ] ||
    "$python" scripts/build_typical_icons.py --model $runs/model --output $runs/typical
recipe=$recipes/moma-icons-typical.yaml
[ -e $runs/tokens-typical/manifest.json ] ||
    "$python" -m modeling_moma tokenize $recipe --processor $runs/processor --output $runs/tokens-typical
[ -e $runs/model-typical/trainer_state.json ] ||
    "$python" "${launcher[@]}" -m modeling_moma pretrain $recipe --model $runs/model \
        --processor $runs/processor --tokens $runs/tokens-typical --output $runs/model-typical \
        --restart-data --resume --set trainer.seed=1 trainer.per_device_train_batch_size=$rows "${short[@]}"
"$python" scripts/release.py --model $runs/model-typical --processor $runs/processor --never-first tags \
    --draw-temperature 0.3 --output $release
# what it makes of training icons, beside which it names new ones
"$python" -m modeling_moma build-memory data/icons --model $release \
    --tags keywords --group family --least-groups 2
"$python" scripts/evaluate_icons.py --model $release --features $runs/features.npy \
    --typical $runs/typical "${few[@]}" --write-card
"$python" scripts/evaluate_unseen_icons.py --model $release ${short:+--limit 24}
