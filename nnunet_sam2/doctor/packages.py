"""Versions: Python, and every package against the range that this package asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from nnunet_sam2.doctor.finding import Finding, fail, ok, warn

PACKAGE = "nnunet_sam2"
NAMED = ("nnunetv2", "torch", "torchvision", "sam2", "SimpleITK")
"""Packages with a line of their own; the others share one."""

DEVELOPERS = ("test",)
"""Extras that nobody needs to run anything."""

VersionOf = Callable[[str], str | None]


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own_requirements() -> list[str]:
    """Return what this package's installation asks for, extras included."""
    return list(metadata.requires(PACKAGE) or [])


def own_python() -> str:
    """Return the versions of Python that this package's installation asks for."""
    found = metadata.metadata(PACKAGE)
    return str(found["Requires-Python"]) if "Requires-Python" in found else ""


def check_python(version: str, wanted: str) -> Finding:
    """Hold the running Python against the range."""
    # A build between two releases ends in "+".
    if SpecifierSet(wanted).contains(version.rstrip("+"), prereleases=True):
        return ok("python", version)
    return fail(
        "python", f"{version}, but {wanted} is needed", "make an environment with a newer Python and install there"
    )


def check_packages(requirements: Sequence[str], version_of: VersionOf) -> Iterator[Finding]:
    """Hold installed packages against their ranges: a line each for the main ones and for whatever is amiss."""
    wanted = [r for r in _parsed(requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = {requirement.name: version_of(requirement.name) for requirement in wanted}
    others = 0
    for requirement in wanted:
        version = found[requirement.name]
        way_out = f"pip install '{_plain(requirement)}'"
        if version is None:
            yield fail(requirement.name, "not installed", way_out)
        elif not _fits(requirement, version):
            yield fail(requirement.name, f"{version}, but {requirement.specifier} is needed", way_out)
        elif requirement.name in NAMED:
            yield ok(requirement.name, version)
        else:
            others += 1
    if others:
        yield ok("other packages", f"{others} within their ranges")


def check_extras(requirements: Sequence[str], version_of: VersionOf) -> Iterator[Finding]:
    """Say which extras are there; a missing one is no fault, one of another version is."""
    extras: dict[str, list[Requirement]] = {}
    for requirement in _parsed(requirements):
        for clause in str(requirement.marker or "").split("extra ==")[1:]:
            extras.setdefault(clause.split('"')[1], []).append(requirement)
    for name, needed in sorted(extras.items()):
        if name in DEVELOPERS:
            continue
        versions = {requirement.name: version_of(requirement.name) for requirement in needed}
        missing = [package for package, version in versions.items() if version is None]
        wrong = [r for r in needed if (version := versions[r.name]) is not None and not _fits(r, version)]
        install = f"pip install '{PACKAGE}[{name}]'"
        if wrong:
            what = ", ".join(f"{r.name} {versions[r.name]}, but {r.specifier} is needed" for r in wrong)
            yield warn(f"extra {name}", what, install)
        elif missing:
            yield ok(f"extra {name}", f"not installed (where it is wanted: {install})")
        else:
            yield ok(f"extra {name}", ", ".join(f"{package} {version}" for package, version in versions.items()))


def _parsed(requirements: Sequence[str]) -> list[Requirement]:
    parsed = []
    for text in requirements:
        try:
            parsed.append(Requirement(text))
        except InvalidRequirement:  # another tool's notation: not ours to judge
            continue
    return parsed


def _fits(requirement: Requirement, version: str) -> bool:
    try:
        return bool(requirement.specifier.contains(Version(version), prereleases=True))
    except InvalidVersion:
        return False


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"
