"""Give nnU-Net's search for trainers the class of the installed package."""

from nnunet_sam2.trainers.nnUNetTrainerSAM2 import nnUNetTrainerSAM2

__all__ = ["nnUNetTrainerSAM2"]
