"""The papers' own figures beside ours: other checkpoints, other data, other protocols, and it says which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Published:
    """Hold one figure of a paper and what stands beside it here."""

    paper: str
    figure: str
    theirs: str
    """Their data, checkpoint and protocol."""
    row: str
    variants: tuple[str, ...]
    kind: str
    """Which of our figures: ``mean`` (all slices) or ``organ_slices``."""
    differs: str


_FEW_SHOT_ROW = "chaos_t2_mr, organ by organ/1"
_CHAOS_THEIRS = "CHAOS T2-SPIR, 20 patients, 5 folds; slices that show the organ"
_CHAOS_DIFFERS = (
    "12 patients of the same challenge, one whole labelled volume as support, one draw, nothing trained on these data"
)

_KINDS = {"mean": "all slices", "organ_slices": "organ slices"}

PUBLISHED = (
    Published(
        paper="Zu et al., arXiv 2503.04826",
        figure="Dice 0.833 (mean of four organs), as others quote it",
        theirs=f"{_CHAOS_THEIRS}; SAM 2 Hiera-tiny with its memory; one support slice",
        row=_FEW_SHOT_ROW,
        variants=("match, paper", "match", "auto"),
        kind="organ_slices",
        differs=f"{_CHAOS_DIFFERS}; the slices that they leave out are labelled too and left out of this figure",
    ),
    Published(
        paper="Zu et al., arXiv 2503.04826",
        figure="Dice 0.845 (mean of three classes), as others quote it",
        theirs="MS-CMRSeg bSSFP, 35 patients, 5 folds; slices that show the class; SAM 2 Hiera-tiny with its memory; "
        "one support slice",
        row="acdc/1",
        variants=("match, paper", "match", "auto"),
        kind="mean",
        differs="another set of cardiac MR (ACDC), both phases, all slices; one whole labelled volume as support",
    ),
    Published(
        paper="FoB + SAM (CVPR 2026), setting I / II",
        figure="Dice 0.845 / 0.805",
        theirs=f"{_CHAOS_THEIRS}; SAM; background points learnt on other organs of the same set",
        row=_FEW_SHOT_ROW,
        variants=("auto",),
        kind="organ_slices",
        differs=_CHAOS_DIFFERS,
    ),
    Published(
        paper="GMRD, as listed by FoB, setting I / II",
        figure="Dice 0.829 / 0.797",
        theirs=f"{_CHAOS_THEIRS}; a prototype network trained on other organs of the same set",
        row=_FEW_SHOT_ROW,
        variants=("auto",),
        kind="organ_slices",
        differs=_CHAOS_DIFFERS,
    ),
    Published(
        paper="SSL-MedSAM2, arXiv 2512.11548",
        figure="Dice 0.971, HD 20.1 (liver, GED4); 0.965, HD 22.0 (liver, T1)",
        theirs="CARE-Liver 2025 test cases; MedSAM2 at 512 px for 30 labelled volumes, then nnU-Net for rounds; what "
        "the labels are worth before nnU-Net is not published",
        row="chaos_t2_mr/3",
        variants=("insert, paper", "insert", "auto"),
        kind="liver",
        differs="liver of CHAOS T2-SPIR, 3 supports; the labels themselves, before any student",
    ),
    Published(
        paper="SAM2-SGP",
        figure="no figure that we could find",
        theirs="fundus, X-ray, CT, MR and ultrasound sets; Hiera-small trained on them with LoRA",
        row="acdc/3",
        variants=("guided, paper", "guided", "auto"),
        kind="mean",
        differs="ACDC is among their sets; here nothing but LoRA is trained, on three labelled volumes",
    ),
    Published(
        paper="Keuth et al., ADSMI 2024",
        figure="Dice 0.743 to 0.842 (17 wrist bones), 0.666 to 0.749 (32 teeth)",
        theirs="X-rays; SAM ViT-H redraws a U-Net's predictions, and a second U-Net learns from them",
        row="acdc/3",
        variants=("refine, paper", "refine", "transfer"),
        kind="mean",
        differs="no such data here: cardiac MR; the student is what `transfer` draws; the "
        "labels themselves, before any student",
    ),
    Published(
        paper="SAM 2 self-training for mammograms, ICIP 2025",
        figure="no figure that we could find",
        theirs="breast region of mini-MIAS and CBIS-DDSM; numbers of the method unpublished",
        row="ddsm_tissue/1",
        variants=("chain, paper", "chain", "auto"),
        kind="mean",
        differs="breast region of 20 images of DDSM",
    ),
)


def published_table(cells: Mapping[str, Mapping[str, Any]], seed: int = 0) -> str:
    """Return the papers' figures beside those of the same preset here; only what was measured is filled in."""
    lines = ["| paper | published | on what | here | on what | what differs |", "|---|---|---|---|---|---|"]
    found = False
    for entry in PUBLISHED:
        row = f"{entry.row}/seed {seed}"
        ours = []
        for task, cell in sorted(cells.get(row, {}).items()):
            checkpoint, _, variant = task.rpartition(": ")
            if checkpoint and variant in entry.variants and "refused" not in cell:
                ours.append(
                    (entry.variants.index(variant), f"{variant} {_figure(cell, entry.kind):.3f} ({checkpoint})")
                )
        found = found or bool(ours)
        text = "<br>".join(figure for _, figure in sorted(ours))
        set_name, _, supports = entry.row.rpartition("/")
        where = f"{set_name}, {supports} support{'s' * (supports != '1')}, {_KINDS.get(entry.kind, entry.kind)}"
        lines.append(f"| {entry.paper} | {entry.figure} | {entry.theirs} | {text} | {where} | {entry.differs} |")
    return "\n".join(["### Beside the papers' own figures", "", *lines]) if found else ""


def _figure(cell: Mapping[str, Any], kind: str) -> float:
    return float(cell[kind] if kind in cell else cell["classes"][kind])
