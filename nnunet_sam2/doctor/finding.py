"""What one check has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum


class Level(str, Enum):
    """Say how bad it is: ``warn`` works but not as well as it could, ``fail`` does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Hold one check's outcome; whatever is not ok says how to mend it."""

    check: str
    level: Level
    message: str
    mend: str = ""

    def __post_init__(self) -> None:
        if self.level is not Level.OK and not self.mend:
            raise ValueError(f"{self.check}: say how to mend it")

    def to_json(self) -> dict[str, str]:
        """Return the finding as a JSON value."""
        return {**asdict(self), "level": self.level.value}


def ok(check: str, message: str) -> Finding:
    """Make a finding of something that is as it should be."""
    return Finding(check=check, level=Level.OK, message=message)


def warn(check: str, message: str, mend: str) -> Finding:
    """Make a finding of something that will do."""
    return Finding(check=check, level=Level.WARN, message=message, mend=mend)


def fail(check: str, message: str, mend: str) -> Finding:
    """Make a finding of something that will not do."""
    return Finding(check=check, level=Level.FAIL, message=message, mend=mend)
