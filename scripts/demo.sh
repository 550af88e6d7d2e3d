#!/usr/bin/env bash
# The main job on a generated cohort: convert, SAM 2 labels, rounds, test Dice. Usage: demo.sh [WORK_DIR]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
work="$(mkdir -p "${1:-$root/demo_work}" && cd "${1:-$root/demo_work}" && pwd)"
export nnUNet_raw="$work/nnUNet_raw" nnUNet_preprocessed="$work/nnUNet_preprocessed" nnUNet_results="$work/nnUNet_results"
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"

show() { echo "+ $*"; "$@"; }
[ -d "$work/source" ] || show python -m nnunet_sam2.cohort.generated "$work/source" \
    --labelled 3 --unlabelled 8 --test 4 --shape 16 48 48
[ -d "$nnUNet_raw/Dataset501_Demo" ] || show nnunet_sam2 convert "$work/source" -d 501 -n Demo \
    --test "$work/source/test"
show nnunet_sam2 run -d 501 -c 3d_fullres -f all \
    --rounds 2 --epochs 6 --device cpu --profile cpu --threads 2
python "$root/scripts/demo_result.py" 501 "$work/result.json"
