"""nnU-Net as a loop uses it: plan, preprocess, make a round's configuration, train, validate, predict, export.

Every function may be called again with the same arguments: what is whole already is kept, what a killed process left
is made anew, and the same inputs give the same labels and weights.
"""

from __future__ import annotations

from nnunet_sam2.rounds.nnunet.base import (
    PLANNERS,
    PLANS,
    TRAINER,
    Fold,
    RoundConfiguration,
    Trained,
    ValidationDice,
    final_checkpoint,
    fold_folder,
    model_folder,
    plans_path,
    read_plans,
)
from nnunet_sam2.rounds.nnunet.cases import preprocess_unlabelled
from nnunet_sam2.rounds.nnunet.configuration import make_round_configuration
from nnunet_sam2.rounds.nnunet.export import export_model
from nnunet_sam2.rounds.nnunet.light import light_configuration, light_settings
from nnunet_sam2.rounds.nnunet.plan import (
    plan_and_preprocess,
    preprocessed_labelled,
    require_splits,
    write_splits,
)
from nnunet_sam2.rounds.nnunet.postprocessing import (
    Postprocessing,
    decide_postprocessing,
    read_postprocessing,
    write_postprocessing,
)
from nnunet_sam2.rounds.nnunet.predict import predict_cases
from nnunet_sam2.rounds.nnunet.training import read_validation, require_pretrained, train

__all__ = [
    "PLANNERS",
    "PLANS",
    "TRAINER",
    "Fold",
    "Postprocessing",
    "RoundConfiguration",
    "Trained",
    "ValidationDice",
    "decide_postprocessing",
    "export_model",
    "final_checkpoint",
    "fold_folder",
    "light_configuration",
    "light_settings",
    "make_round_configuration",
    "model_folder",
    "plan_and_preprocess",
    "plans_path",
    "predict_cases",
    "preprocess_unlabelled",
    "preprocessed_labelled",
    "read_plans",
    "read_postprocessing",
    "read_validation",
    "require_pretrained",
    "require_splits",
    "train",
    "write_postprocessing",
    "write_splits",
]
