"""A source that comes as an archive, such as a task of the Medical Segmentation Decathlon."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_sam2.errors import InputError, NnunetSam2Error
from nnunet_sam2.files.archives import ARCHIVE_ENDINGS, is_archive, only_folder, unpack
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import say
from nnunet_sam2.storage import TEMPORARY_MARK


@contextmanager
def source_folder(source: Path, folders: DatasetFolders, unpack_to: Path | None) -> Iterator[Path]:
    """Yield the folder to convert: ``source`` itself, or what an archive holds.

    An archive is unpacked to ``unpack_to`` and stays there, or beside the dataset and is removed when the block ends.
    """
    if not is_archive(source) or source.is_dir():
        if unpack_to is not None:
            raise InputError(f"--unpack-to is for archives ({' '.join(ARCHIVE_ENDINGS)}), {source} is none")
        yield source
        return
    for leftover in folders.raw.parent.glob(f"{TEMPORARY_MARK}*{folders.name}.unpacked"):
        shutil.rmtree(leftover)
    place = unpack_to or _place(folders)
    try:
        count = unpack(source, place)
        say(f"{source}: {count} files unpacked" + (f" to {place}" if unpack_to else ""))
        yield only_folder(place)
    except NnunetSam2Error as error:
        raise type(error)(in_users_words(str(error), source, folders)) from None
    finally:
        if unpack_to is None:
            shutil.rmtree(place, ignore_errors=True)


def in_users_words(text: str, source: Path, folders: DatasetFolders) -> str:
    """Name the archive in a message, where it names the folder that is gone when the message is read."""
    return text.replace(str(_place(folders)), str(source))


def _place(folders: DatasetFolders) -> Path:
    return folders.raw.parent / f"{TEMPORARY_MARK}{folders.name}.unpacked"
