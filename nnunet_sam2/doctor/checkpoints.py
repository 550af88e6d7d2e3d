"""SAM 2's weights: the model that comes with the package, and those that were fetched or added."""

from __future__ import annotations

from collections.abc import Iterator

from nnunet_sam2.doctor.finding import Finding, fail, ok, warn
from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2.weights.bundled import verify_bundled
from nnunet_sam2.sam2.weights.cache import (
    all_names,
    kept_path,
    partial_files,
    read_record,
    recorded_names,
    verify_weights,
)
from nnunet_sam2.sam2.weights.registry import EMBEDDED, ENTRIES


def check_embedded() -> Finding:
    """Hash the model in the package against its installation."""
    return judge_embedded(verify_bundled(ENTRIES[EMBEDDED]))


def judge_embedded(verdict: str) -> Finding:
    """Judge what `verify_bundled` says."""
    check = f"weights {EMBEDDED}"
    if verdict.startswith("OK"):
        return ok(check, verdict.removeprefix("OK").removeprefix(": ") or "as installed")
    return fail(check, verdict.split(";")[0], "pip install --force-reinstall nnunet_sam2")


def check_kept() -> Iterator[Finding]:
    """Hash every kept file again, and name downloads that were not finished."""
    for name in recorded_names():
        yield check_record(name)
    for name in all_names():
        if name not in recorded_names() and (parts := partial_files(name)):
            megabytes = sum(path.stat().st_size for path in parts) / 1e6
            what = f"{megabytes:.0f} MB of it are here, from a download that was not finished"
            yield warn(f"weights {name}", what, f"nnunet_sam2 weights fetch {name}")


def check_record(name: str) -> Finding:
    """Check the kept file of one name."""
    check = f"weights {name}"
    again = f"nnunet_sam2 weights fetch {name}" if name in ENTRIES else f"nnunet_sam2 weights add {name} FILE"
    try:
        record = read_record(name)
    except InputError as error:
        return fail(check, str(error).split(";")[0], f"remove its record, then: {again}")
    if record is None:
        return ok(check, "not kept")
    verdict = verify_weights(record)
    if verdict == "OK":
        return ok(check, f"{kept_path(record)}, as recorded on {record.recorded[:10]}")
    return fail(check, f"{kept_path(record)}: {verdict}", again)
