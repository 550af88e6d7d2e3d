"""The SAM 2 weights that have a name: who publishes them and where, their licence, architecture and input size."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from nnunet_sam2.sam2.config import UNTRAINED

EMBEDDED = "embedded"
"""Name of the small model that comes with the package."""

BUNDLED_FOLDER = Path(__file__).parent
SEE_ORIGIN = "see origin"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """Hold what is known of named weights before they are there."""

    name: str
    title: str
    config: str
    """Architecture, one of `nnunet_sam2.sam2.config.config_names`."""
    publisher: str
    licence: str
    native_size: int
    """Side in pixels at which the weights were trained."""
    repo: str | None = None
    """Repository on the Hugging Face hub; None: the weights come with the package, or from a file of the user."""
    file: str | None = None
    size_mb: int | None = None
    """Megabytes as the publisher's page shows them."""
    size: int | None = None
    """Bytes, from the publisher's own page."""
    sha256: str | None = None
    """Hash of the published file, from the publisher's own page. None: recorded at the first fetch, enforced after."""
    note: str = ""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    bundled: bool = False
    """Whether the weights come with the package."""

    def __post_init__(self) -> None:
        if (self.repo is None) is not (self.file is None):
            raise ValueError(f"{self.name}: a repository and a file belong together")

    @property
    def page(self) -> str | None:
        """Return the address of the publisher's page."""
        return None if self.repo is None else f"https://huggingface.co/{self.repo}"

    @property
    def bundled_path(self) -> Path | None:
        """Return where the file lies that comes with the package; None for weights that do not."""
        return BUNDLED_FOLDER / f"{self.name}.safetensors" if self.bundled and self.name != UNTRAINED else None

    @property
    def needs(self) -> str:
        """Say what has to happen before the weights can be used."""
        if self.bundled:
            return "nothing: it comes with the package"
        if self.repo is None:
            return f"a file: nnunet_sam2 weights add {self.name} FILE"
        megabytes = f" of {self.size_mb} MB" if self.size_mb else ""
        return f"one download{megabytes}: nnunet_sam2 weights fetch {self.name}"


def _meta(
    version: str, size: str, *, size_mb: int, size_bytes: int | None = None, sha256: str | None = None
) -> WeightsEntry:
    stem = f"sam{version}_hiera_{size}"
    return WeightsEntry(
        name=stem,
        title=f"SAM {version} Hiera-{size.replace('_plus', '+')}",
        config=stem,
        publisher="Meta",
        licence="Apache-2.0",
        native_size=1024,
        repo=f"facebook/sam{version}-hiera-{size.replace('_', '-')}",
        file=f"{stem}.pt",
        size_mb=size_mb,
        size=size_bytes,
        sha256=sha256,
    )


def _medsam2(suffix: str, file: str, note: str, *, size_mb: int | None = 156) -> WeightsEntry:
    return WeightsEntry(
        name=f"medsam2{suffix}",
        title=f"MedSAM2 ({file.removeprefix('MedSAM2_').removesuffix('.pt')})",
        config="sam2.1_hiera_tiny",
        publisher="WangLab, University of Toronto",
        licence="CC-BY-SA-4.0",
        native_size=512,
        repo="wanglab/MedSAM2",
        file=file,
        size_mb=size_mb,
        note=f"SAM 2.1 Hiera-tiny, trained further on public medical sets, {note}; those sets are not unseen",
    )


# Hashes and byte counts stand here only where a page of the publisher's own repository shows them.
_ENTRIES = (
    WeightsEntry(
        name=EMBEDDED,
        title="embedded small SAM 2",
        config=EMBEDDED,
        publisher="nnunet_sam2",
        licence="Apache-2.0",
        native_size=256,
        bundled=True,
        note="trained on synthetic images, so that every real set is unseen",
    ),
    WeightsEntry(
        name=UNTRAINED,
        title="untrained small SAM 2",
        config=UNTRAINED,
        publisher="nnunet_sam2",
        licence="Apache-2.0",
        native_size=512,
        bundled=True,
        note="random weights from a fixed seed, to try things with: not a labeller",
    ),
    _meta(
        "2",
        "tiny",
        size_mb=156,
        size_bytes=155906050,
        sha256="65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
    ),
    _meta("2", "small", size_mb=184, sha256="95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3"),
    _meta("2", "base_plus", size_mb=323, sha256="d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071"),
    _meta("2", "large", size_mb=898),
    _meta("2.1", "tiny", size_mb=156, sha256="7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
    _meta("2.1", "small", size_mb=184, sha256="6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
    _meta("2.1", "base_plus", size_mb=324),
    _meta("2.1", "large", size_mb=898),
    _medsam2("", "MedSAM2_latest.pt", "the publisher's latest", size_mb=None),
    _medsam2("_2411", "MedSAM2_2411.pt", "state of November 2024"),
    _medsam2("_ct_lesion", "MedSAM2_CTLesion.pt", "then on lesions in CT"),
    _medsam2("_mri_liver_lesion", "MedSAM2_MRI_LiverLesion.pt", "then on liver lesions in MRI"),
    _medsam2("_us_heart", "MedSAM2_US_Heart.pt", "then on heart ultrasound"),
)

ENTRIES: dict[str, WeightsEntry] = {entry.name: entry for entry in _ENTRIES}
"""Named weights, in the order in which they are listed."""


def resembling(text: str, names: list[str]) -> str | None:
    """Return the name that was probably meant: of the same published file or repository, or spelt nearly so."""
    for entry in ENTRIES.values():
        if entry.file is not None and text in (entry.file, entry.repo, f"{entry.name}.pt"):
            return entry.name
    near = difflib.get_close_matches(Path(text).name.lower(), names, n=1, cutoff=0.75)
    return near[0] if near else None
