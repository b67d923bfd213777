#!/usr/bin/env bash
# Trains the model of icons from nothing and rewrites its card. Some hours on two cores; `runs/icons` keeps every stage,
# and a killed stage goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
recipe=recipes/moma-icons.yaml

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

[ -e runs/icons/tokenizer/model.safetensors ] ||
    "$python" -m modeling_moma train-image-tokenizer $recipe --output runs/icons/tokenizer --resume
[ -e runs/icons/processor/processor_config.json ] ||
    "$python" -m modeling_moma build-processor $recipe --image-tokenizer runs/icons/tokenizer --output runs/icons/processor
[ -e runs/icons/tokens/manifest.json ] ||
    "$python" -m modeling_moma tokenize $recipe --processor runs/icons/processor --output runs/icons/tokens
# the released model was trained by PROCESSES=2 of one thread each, which take the same steps in less time
launcher=() rows=16 processes=${PROCESSES:-1}
if [ "$processes" -gt 1 ]; then
    launcher=(-m torch.distributed.run --standalone --nproc-per-node "$processes")
    rows=$((rows / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
# written last, when the run is finished
[ -e runs/icons/model/trainer_state.json ] ||
    "$python" "${launcher[@]}" -m modeling_moma pretrain $recipe --processor runs/icons/processor \
        --tokens runs/icons/tokens --output runs/icons/model --batch-size $rows --resume
# each stage from the weights of the one before
start=runs/icons/model before= seed=0
for further in longer longer muon muon captions captions drawings; do
    seed=$((seed + 1))
    stage=runs/icons/$further-$seed
    if [ $seed -eq 6 ]; then
        # a layer more, which adds nothing at first
        [ -e runs/icons/deeper/layers.json ] ||
            "$python" -m modeling_moma add-layers --model $start --after 2 --output runs/icons/deeper
        start=runs/icons/deeper
    elif [ $seed -eq 7 ]; then
        # means of a stage and of what it began at predict better than either
        [ -e runs/icons/mean/config.json ] ||
            "$python" scripts/release.py --model $start --earlier $before --earlier-share 0.33 \
                --processor runs/icons/processor --output runs/icons/mean
        start=runs/icons/mean
    fi
    [ -e $stage/trainer_state.json ] ||
        "$python" "${launcher[@]}" -m modeling_moma pretrain recipes/moma-icons-$further.yaml --model $start \
            --processor runs/icons/processor --tokens runs/icons/tokens --output $stage --batch-size $rows \
            --seed $seed --restart-data --resume
    before=$start start=$stage
done
# and of the last of these: they name icons well, and choose those that are to be drawn
[ -e runs/icons/named/config.json ] ||
    "$python" scripts/release.py --model $start --earlier $before --earlier-share 0.33 \
        --processor runs/icons/processor --output runs/icons/named
[ -e runs/icons/typical/train.parquet ] ||
    "$python" scripts/build_typical_icons.py --model runs/icons/named --output runs/icons/typical
recipe=recipes/moma-icons-typical.yaml
[ -e runs/icons/tokens-typical/manifest.json ] ||
    "$python" -m modeling_moma tokenize $recipe --processor runs/icons/processor --output runs/icons/tokens-typical
[ -e runs/icons/typical-8/trainer_state.json ] ||
    "$python" "${launcher[@]}" -m modeling_moma pretrain $recipe --model runs/icons/named \
        --processor runs/icons/processor --tokens runs/icons/tokens-typical --output runs/icons/typical-8 \
        --batch-size $rows --seed 8 --resume
# what was learnt before, again
[ -e runs/icons/rehearsal-9/trainer_state.json ] ||
    "$python" "${launcher[@]}" -m modeling_moma pretrain recipes/moma-icons-rehearsal.yaml --model runs/icons/typical-8 \
        --processor runs/icons/processor --tokens runs/icons/tokens-typical --output runs/icons/rehearsal-9 \
        --batch-size $rows --seed 9 --restart-data --resume
"$python" scripts/release.py --model runs/icons/rehearsal-9 --processor runs/icons/processor --never-first tags \
    --draw-temperature 0.3 --output model_cards/moma-icons
# what it makes of training icons, beside which it names new ones
"$python" -m modeling_moma build-memory data/icons --model model_cards/moma-icons \
    --tags keywords --group family --least-groups 2
"$python" scripts/evaluate_icons.py --model model_cards/moma-icons --features runs/icons/features.npy \
    --typical runs/icons/typical --write-card
