"""The folder that ``nnUNet_extTrainer`` names; nothing but the shim may lie here."""
