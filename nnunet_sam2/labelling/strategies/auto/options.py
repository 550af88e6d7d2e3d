"""What a user can choose of auto."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_sam2.labelling.strategies.transfer.strategy import TransferOptions


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """Say from how many sides, and from how near, a volume is labelled."""

    views: str = "auto"
    """``auto``: along all three axes where the voxels are about as long as wide, else along the slices; ``one``."""
    zoom: str = "on"
    """``on``: labels are transferred between close-ups of the part that the labels fill; ``off``: on whole slices."""
    intensities: str = "checked"
    """``checked``: a query whose intensities are foreign to the supports is matched to them; ``as they are``: never."""
    subject: str = "checked"
    """``checked``: in single pictures of one class, the subject parted from the background by its intensity stands in
    for a transfer that contradicts it, where human labels are the subject; ``off``: never."""
    alignment: str = "on"
    """``on``: supports are bent onto a volume by what a first look finds there, scans of different parts of the body
    are brought to what they share, and thin classes have a nearer look in groups; ``off``: places count as they are."""
    decoder: str = "checked"
    """As in `TransferOptions`."""
    check_slices: int = 24
    """As in `TransferOptions`, for each view and each close-up."""

    def __post_init__(self) -> None:
        if self.views not in ("auto", "one"):
            raise ValueError(f"views={self.views}: choose auto or one")
        if self.zoom not in ("on", "off"):
            raise ValueError(f"zoom={self.zoom}: choose on or off")
        if self.intensities not in ("checked", "as they are"):
            raise ValueError(f"intensities={self.intensities}: choose checked or as they are")
        if self.alignment not in ("on", "off"):
            raise ValueError(f"alignment={self.alignment}: choose on or off")
        if self.subject not in ("checked", "off"):
            raise ValueError(f"subject={self.subject}: choose checked or off")
        self.transfer_options()

    def transfer_options(self) -> TransferOptions:
        """Return the options of each view's transfer."""
        return TransferOptions(decoder=self.decoder, check_slices=self.check_slices)
