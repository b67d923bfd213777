#!/usr/bin/env bash
# Trains the model of icons from nothing and rewrites its card. Some hours on two cores; `runs/icons` keeps every stage,
# and a killed stage goes on from its last checkpoint. STEPS=20 tries all of it in `runs/icons-short`, with
# trainings of so many steps and few icons measured, and leaves the released model alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
runs=runs/icons recipes=recipes release=model_cards/moma-icons short=() few=()
if [ -n "${STEPS:-}" ]; then
    runs=runs/icons-short recipes=runs/icons-short/recipes release=runs/icons-short/release
    short=(--steps "$STEPS") few=(--limit 24 --ranked 8 --queries 8 --drawings 24 --train-images 2000)
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
    "$python" -m modeling_moma train-image-tokenizer $recipe --output $runs/tokenizer "${short[@]}" --resume
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
        --tokens $runs/tokens --output $runs/model --batch-size $rows "${short[@]}" --resume
# each stage from the weights of the one before
start=$runs/model before= seed=0
for further in longer longer muon muon captions captions drawings; do
    seed=$((seed + 1))
    stage=$runs/$further-$seed
    if [ $seed -eq 6 ]; then
        # a layer more, which adds nothing at first
        [ -e $runs/deeper/layers.json ] ||
            "$python" -m modeling_moma add-layers --model $start --after 2 --output $runs/deeper
        start=$runs/deeper
    elif [ $seed -eq 7 ]; then
        # means of a stage and of what it began at predict better than either
        [ -e $runs/mean/config.json ] ||
            "$python" scripts/release.py --model $start --earlier $before --earlier-share 0.33 \
                --processor $runs/processor --output $runs/mean
        start=$runs/mean
    fi
    [ -e $stage/trainer_state.json ] ||
        "$python" "${launcher[@]}" -m modeling_moma pretrain $recipes/moma-icons-$further.yaml --model $start \
            --processor $runs/processor --tokens $runs/tokens --output $stage --batch-size $rows "${short[@]}" \
            --seed $seed --restart-data --resume
    before=$start start=$stage
done
# and of the last of these: they name icons well, and choose those that are to be drawn
[ -e $runs/named/config.json ] ||
    "$python" scripts/release.py --model $start --earlier $before --earlier-share 0.33 \
        --processor $runs/processor --output $runs/named
[ -e $runs/typical/train.parquet ] ||
    "$python" scripts/build_typical_icons.py --model $runs/named --output $runs/typical
recipe=$recipes/moma-icons-typical.yaml
[ -e $runs/tokens-typical/manifest.json ] ||
    "$python" -m modeling_moma tokenize $recipe --processor $runs/processor --output $runs/tokens-typical
[ -e $runs/typical-8/trainer_state.json ] ||
    "$python" "${launcher[@]}" -m modeling_moma pretrain $recipe --model $runs/named \
        --processor $runs/processor --tokens $runs/tokens-typical --output $runs/typical-8 \
        --batch-size $rows "${short[@]}" --seed 8 --resume
# what was learnt before, again
[ -e $runs/rehearsal-9/trainer_state.json ] ||
    "$python" "${launcher[@]}" -m modeling_moma pretrain $recipes/moma-icons-rehearsal.yaml --model $runs/typical-8 \
        --processor $runs/processor --tokens $runs/tokens-typical --output $runs/rehearsal-9 \
        --batch-size $rows "${short[@]}" --seed 9 --restart-data --resume
"$python" scripts/release.py --model $runs/rehearsal-9 --processor $runs/processor --never-first tags \
    --draw-temperature 0.3 --output $release
# what it makes of training icons, beside which it names new ones
"$python" -m modeling_moma build-memory data/icons --model $release \
    --tags keywords --group family --least-groups 2
"$python" scripts/evaluate_icons.py --model $release --features $runs/features.npy \
    --typical $runs/typical "${few[@]}" --write-card
