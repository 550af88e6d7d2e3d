"""``nnunet_sam2 export``: a model folder that stock nnU-Net predicts with, without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_sam2.cli.predict import add_model_arguments, chosen_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; nnU-Net's letters where nnU-Net has one."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    parser.add_argument("-o", dest="out", type=Path, required=True, help="folder to write, new or an older export")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the model folder and print the command that predicts with it."""
    from nnunet_sam2.folders import find_dataset
    from nnunet_sam2.progress import say
    from nnunet_sam2.rounds.nnunet import export_model, read_postprocessing

    folders = find_dataset(args.dataset)
    chosen = chosen_model(folders, args)
    out = export_model(folders, chosen.configuration, chosen.folds, args.out.resolve(), plans=chosen.plans)
    say(f"{chosen.configuration}, {chosen.described_folds}, as a stock nnU-Net model: {out}")
    say(f"predict with: nnUNetv2_predict_from_modelfolder -i IMAGES -o OUT -m {out} -f {' '.join(chosen.folds)}")
    decided = read_postprocessing(out)
    if decided and decided.steps:
        say(f"and then: nnUNetv2_apply_postprocessing -i OUT -o FINAL -pp_pkl_file {out}/postprocessing.pkl")
    return 0
