"""nnU-Net's three folders and the user's caches: set, apart from each other, writable, with room."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from nnunet_sam2.doctor.finding import Finding, fail, ok, warn
from nnunet_sam2.folders import VARIABLES
from nnunet_sam2.machine import nearest_existing
from nnunet_sam2.rounds.disk import free_bytes, readable

LEAST_ROOM, GOOD_ROOM = 10**9, 20 * 10**9
"""Bytes: below the first no run ends, below the second one of many volumes may not."""


def check_roots(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check each of nnU-Net's variables, and that they name three places."""
    places: dict[str, Path] = {}
    for name in VARIABLES:
        finding = check_root(name, environment.get(name))
        yield finding
        value = environment.get(name)
        if value and Path(value).expanduser().is_absolute():
            places[name] = Path(value).expanduser().resolve()
    yield check_apart(places)


def check_root(name: str, value: str | None) -> Finding:
    """Check one variable: set, absolute, a folder that can be written to."""
    if not value:
        return fail(name, "not set", f"export {name}=/path/to/{name}")
    path = Path(value).expanduser()
    if not path.is_absolute():
        return fail(name, f"{value} is a relative path", f"export {name}={path.resolve()}")
    there = nearest_existing(path)
    if there == path and not path.is_dir():
        return fail(name, f"{path} is a file", f"export {name}=/path/to/a/folder")
    if there != path:
        if problem := write_problem(there):
            return fail(name, f"{path} does not exist and cannot be made ({problem})", f"export {name}=/path/of/yours")
        return ok(name, f"{path}, made when it is needed")
    if problem := write_problem(path):
        reading_will_do = name == VARIABLES[0]
        make = warn if reading_will_do else fail
        more = ": enough to run, not to convert" if reading_will_do else ""
        return make(name, f"{path} cannot be written to ({problem}){more}", f"chmod u+w '{path}', or another folder")
    return ok(name, str(path))


def check_apart(places: Mapping[str, Path]) -> Finding:
    """Check that no variable names another's folder, or one within it."""
    names = list(places)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = places[first], places[second]
            if a == b:
                return fail(
                    "folders apart", f"{first} and {second} are both {a}", f"export {second}={a.parent / second}"
                )
            if a in b.parents or b in a.parents:
                inner, outer = (second, first) if a in b.parents else (first, second)
                mend = f"export {inner}={places[outer].parent / inner}"
                return warn("folders apart", f"{inner} lies within {outer}", mend)
    return ok("folders apart", f"{len(places)} places")


def check_room(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check the free disk where preprocessed data and results go."""
    for name in VARIABLES[1:]:
        value = environment.get(name)
        if value and Path(value).expanduser().is_absolute():
            yield check_free(f"disk of {name}", free_bytes(Path(value).expanduser()))


def check_free(check: str, free: int) -> Finding:
    """Hold free bytes against what runs take."""
    mend = "make room, or set the variable to a larger disk; nnunet_sam2 run -d ID --dry-run says what a run writes"
    if free < LEAST_ROOM:
        return fail(check, f"{readable(free)} free", mend)
    if free < GOOD_ROOM:
        return warn(check, f"{readable(free)} free", mend)
    return ok(check, f"{readable(free)} free")


def check_cache(check: str, folder: Path, *, variable: str) -> Finding:
    """Check that a cache can be written to; without it nothing is kept."""
    if problem := write_problem(nearest_existing(folder)):
        return warn(check, f"{folder} cannot be written to ({problem})", f"export {variable}=/path/of/yours")
    return ok(check, str(folder))


def write_problem(folder: Path) -> str:
    """Return why no file can be made in a folder, or nothing; a file is made and removed to know."""
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(b"x")
            handle.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""
