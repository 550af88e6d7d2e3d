"""What others report on ACDC in the split of SSL4MIS, test Dice."""

from __future__ import annotations

PUBLISHED = (
    # method, Dice with 1, 3, 7 labelled patients, remark
    ("U-Net, labelled only", "", "0.478", "0.794", "all 70 labelled: 0.914"),
    ("nnU-Net, labelled only", "", "0.830", "0.863", ""),
    ("UA-MT", "", "0.460", "0.817", ""),
    ("SS-Net", "", "0.658", "0.868", ""),
    ("BCP", "", "0.876", "0.888", ""),
    ("CPC-SAM", "", "0.880", "", ""),
    ("UniMatch", "0.854", "0.844 to 0.889", "0.881 to 0.899", "with 1 patient: validation and test merged"),
    ("DiffRect", "0.824", "", "", ""),
    ("ABD", "", "0.890", "0.898", ""),
    ("TraCoCo", "", "0.895", "0.904", ""),
    ("OPMatch", "", "0.897", "0.905", ""),
    ("nnFilterMatch", "", "0.895", "0.896", "nnU-Net, 75,000 iterations; with active learning 0.896 and 0.901"),
)
