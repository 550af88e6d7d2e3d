"""Which files are which case and channel: one rule for every command that is given a folder of images.

``img_0001`` may be channel 1 of ``img``, as nnU-Net names it, or a case of its own, as a scanner's export numbers
them. What is known decides, in this order: how many files a case has, what labels are called, what the other images of
the set are called, and last the names themselves. What stays open is refused with both readings.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Collection, Mapping, Set
from pathlib import Path

from nnunet_sam2.errors import InputError

_SUFFIX = re.compile(r"(.+)_(\d{4})")

SUFFIX_MEANS = ("auto", "channel", "case")
"""What ``--suffix`` may say of four digits at the end of a name."""


def add_suffix_argument(parser: ArgumentParser) -> None:
    """Declare ``--suffix``, which settles what names leave open."""
    parser.add_argument(
        "--suffix",
        choices=SUFFIX_MEANS,
        default="auto",
        help="what _0000 at the end of an image's name means: a channel of a case, as in nnU-Net, or part of the "
        "case's own name (default: what channels, labels and the other names tell; what stays open is refused)",
    )


def cases_of_files(
    files: Mapping[str, Path],
    *,
    counts: Collection[int] | None = None,
    labelled: Set[str] = frozenset(),
    others: Collection[tuple[str, str]] = (),
    suffix: str = "auto",
) -> dict[str, tuple[Path, ...]]:
    """Sort image files, by stem, into cases: id -> its files in the order of their channels.

    ``counts`` are the numbers of files that a case may have, None where nothing is known. ``labelled`` are the stems of
    label files, ``others`` pairs of a case and the stem of an image of it, of images that are sorted already.
    ``suffix`` is what the user says (`SUFFIX_MEANS`). Raises `InputError` where names fit no reading, or two.
    """
    if not files:
        return {}
    matches = {stem: _SUFFIX.fullmatch(stem) for stem in files}
    grouped: dict[str, dict[int, Path]] = {}
    for stem, match in matches.items():
        case_id, channel = (match[1], int(match[2])) if match else (stem, 0)
        grouped.setdefault(case_id, {})[channel] = files[stem]
    reading = suffix if suffix != "auto" else _reading(matches, grouped, counts, labelled, others)
    if reading == "case":
        _require_single(files, counts)
        return {stem: (path,) for stem, path in files.items()}
    wanted = max(counts) if counts else 1 + max(max(channels) for channels in grouped.values())
    _require_channels(matches, grouped, files, wanted)
    return {case_id: tuple(path for _, path in sorted(channels.items())) for case_id, channels in grouped.items()}


def _reading(
    matches: Mapping[str, re.Match[str] | None],
    grouped: Mapping[str, Mapping[int, Path]],
    counts: Collection[int] | None,
    labelled: Set[str],
    others: Collection[tuple[str, str]],
) -> str:
    """Say whether four digits at the end of the names mean ``channel`` or ``case``."""
    if not any(matches.values()):
        return "case" if counts is None or 1 in counts else "channel"
    found = {len(channels) for channels in grouped.values()}
    whole = len(found) == 1 and all(set(channels) == set(range(len(channels))) for channels in grouped.values())
    numbered = all(matches.values())
    if counts is not None:
        if 1 not in counts:
            return "channel"
        # One file a case: what bears a suffix may stand beside what bears none.
        if not whole or found.isdisjoint(counts) or not (numbered or found == {1}):
            return "case"
    by_case, by_channel = labelled & set(matches), labelled & set(grouped)
    if by_case != by_channel:
        if not by_case - by_channel:
            return "channel"
        if not by_channel - by_case:
            return "case"
        raise _open(grouped, why=f"labels fit both: {min(by_case - by_channel)} and {min(by_channel - by_case)}")
    if counts is None and not (numbered and all(0 in channels for channels in grouped.values())):
        return "case"
    means = {_means(case_id, stem) for case_id, stem in others} - {None}
    if len(means) == 1:
        return str(means.pop())
    if others and not means:
        raise _open(grouped, why="the other images of the set bear no such numbers")
    # nnU-Net's own naming, which each case's 0000 shows, is taken at its word; a row of numbers after one name is not.
    if len(grouped) > 1 or found == {1}:
        return "channel"
    raise _open(grouped, why="no label and no number of channels tells")


def _means(case_id: str, stem: str) -> str | None:
    """Say what the suffix of one sorted image means; None where it has none."""
    if not _SUFFIX.fullmatch(stem):
        return None
    return "case" if stem == case_id else "channel"


def _open(grouped: Mapping[str, Mapping[int, Path]], *, why: str) -> InputError:
    case_id, channels = next(iter(sorted(grouped.items(), key=lambda item: -len(item[1]))))
    path = channels[min(channels)]
    count = f"{len(channels)} channels of one case {case_id}" if len(channels) > 1 else f"channel 0 of case {case_id}"
    cases = f"{len(channels)} cases" if len(channels) > 1 else f"case {case_id}_{min(channels):04d}"
    return InputError(
        f"{path.parent}: {path.name} may belong to {count}, or to {cases} with one channel ({why}); "
        "say which with --suffix channel or --suffix case"
    )


def _require_single(files: Mapping[str, Path], counts: Collection[int] | None) -> None:
    if counts is not None and 1 not in counts:
        path = next(iter(files.values()))
        raise InputError(
            f"{path}: a case takes {max(counts)} files here, one a channel; name them "
            f"{next(iter(files))}_0000, {next(iter(files))}_0001 and so on"
        )


def _require_channels(
    matches: Mapping[str, re.Match[str] | None],
    grouped: Mapping[str, Mapping[int, Path]],
    files: Mapping[str, Path],
    count: int,
) -> None:
    bare = sorted(stem for stem, match in matches.items() if not match)
    for stem in bare:
        if f"{stem}_0000" in files:
            raise InputError(f"{files[stem]} and {files[f'{stem}_0000'].name} are the same case; remove one")
    if bare and count > 1:
        text = f"a case takes {count} files here" if len(bare) == len(files) else "other images have one"
        raise InputError(
            f"{files[bare[0]]} has no channel suffix, {text}; name it {bare[0]}_0000, or correct the number of "
            "channels (--channels, dataset.json)"
        )
    for case_id, channels in grouped.items():
        some = next(iter(channels.values()))
        for channel in range(count):
            if channel not in channels:
                raise InputError(
                    f"case {case_id} in {some.parent} lacks channel {case_id}_{channel:04d}, a case has {count} "
                    "channels; add the file or remove the case"
                )
        surplus = sorted(set(channels) - set(range(count)))
        if surplus:
            raise InputError(
                f"channel {case_id}_{surplus[0]:04d} in {some.parent} is surplus, a case has {count}; remove the file, "
                "or give --suffix case where it is a case of its own"
            )
