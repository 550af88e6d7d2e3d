"""Auto: what the evidence favours: transfer between close-ups, seen from every side that shows the volume well."""

from nnunet_sam2.labelling.strategies.auto.strategy import Auto, AutoOptions

__all__ = ["Auto", "AutoOptions"]
