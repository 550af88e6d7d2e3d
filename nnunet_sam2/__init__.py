"""A few labelled volumes and many unlabelled ones become a trained nnU-Net, with SAM 2 as the labeller."""

from __future__ import annotations

__version__ = "0.1.0"
