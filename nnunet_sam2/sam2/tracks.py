"""Walks through pseudo-videos as a tree of steps: steps that several walks have in common are taken once.

A walk backwards is a walk forwards through the reversed video, since SAM 2's memory knows distances alone. Two walks
with the same prompts at the same distances share their steps for as long as they see the same frames. Nothing here
computes; shape letters: K objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from nnunet_sam2.sam2.protocol import Embeddings, VideoWalk

Frame = tuple[Embeddings, int]


class Prompt(NamedTuple):
    """Name a prompted frame of one object."""

    offset: int
    """Distance from the first frame of the walk."""
    memory: str
    """Key of frame and mask."""


class Answer(NamedTuple):
    """Say whose answer a step gives."""

    walk: int
    frame: int
    """Position in that walk's video."""
    object: int


@dataclass(frozen=True)
class Root:
    """Hold what all steps of a track depend on."""

    prompts: tuple[Prompt, ...]
    pointer_limit: int
    """Frames whose object pointers may be read, as far as the length of the video decides."""

    @cached_property
    def memories(self) -> tuple[str, ...]:
        """Return the keys of the prompted frames in an order that the direction of the walk does not change."""
        return tuple(sorted(prompt.memory for prompt in self.prompts))


@dataclass(slots=True, eq=False)
class Step:
    """Hold one frame of one object with one past."""

    root: Root
    frame: Frame
    offset: int
    height: int = 0
    """Frames from here to the last one that any walk through this step asks for."""
    next: list[Step] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    state: Any = None
    """What the steps before left behind; set when they were taken, gone when this one is."""


@dataclass(slots=True, eq=False)
class _Open:
    """Hold the beginnings of tracks with one root, and the steps by what follows what while the tree grows."""

    first: list[Step] = field(default_factory=list)
    by_path: dict[tuple[int, Any], Step] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hold the steps of many walks."""

    first: list[Step]
    """Steps without any before them."""
    waited_for: Mapping[tuple[int, int], int]
    """How many objects' answers make up one frame (walk, position) that is to be answered."""
    objects: tuple[int, ...]
    """Number of objects of each walk."""


def plan_steps(
    walks: Sequence[VideoWalk], prompts: Sequence[Mapping[int, Mapping[int, str]]], longest_reach: int
) -> Plan:
    """Join walks into a tree of steps.

    ``prompts`` maps each walk's prompted positions to the keys of the objects' memories there; objects without mask
    on a frame are not among them. ``longest_reach`` bounds the number of pointers where the video does not.
    """
    opened: dict[Root, _Open] = {}
    waited_for: dict[tuple[int, int], int] = {}
    for w, (walk, shown) in enumerate(zip(walks, prompts, strict=True)):
        if not shown:
            continue
        start = max(shown) if walk.reverse else min(shown)
        sign = -1 if walk.reverse else 1
        positions = range(start, -1, -1) if walk.reverse else range(start, len(walk.video))
        wanted = [t for t in positions if t not in shown and (walk.asked is None or t in walk.asked)]
        if not wanted:
            continue
        # What lies behind the last frame asked for is of no use.
        end = abs(wanted[-1] - start)
        answered = set(wanted)
        limit = min(len(walk.video), longest_reach)
        for k in sorted({k for keys in shown.values() for k in keys}):
            own = sorted((sign * (t - start), keys[k]) for t, keys in shown.items() if k in keys)
            root = Root(tuple(Prompt(*prompt) for prompt in own), limit)
            tree = opened.setdefault(root, _Open())
            prompted = {prompt.offset for prompt in root.prompts}
            before: Step | None = None
            for offset in range(end + 1):
                if offset in prompted:
                    continue
                t = start + sign * offset
                before = _follow(tree, root, before, walk.video[t], offset)
                before.height = max(before.height, end - offset)
                if t in answered:
                    before.answers.append(Answer(w, t, k))
                    waited_for[w, t] = waited_for.get((w, t), 0) + 1
    first = [step for tree in opened.values() for step in tree.first]
    return Plan(first=first, waited_for=waited_for, objects=tuple(_objects(walk.masks_kss) for walk in walks))


def rounds(first: Sequence[Step]) -> Iterator[list[Step]]:
    """Yield steps that can be taken together: those farthest from their end, every step after the one before it.

    Walks to the same end then stand on the same frame, wherever they came from.
    """
    ready: dict[int, list[Step]] = {}
    for step in first:
        ready.setdefault(step.height, []).append(step)
    while ready:
        taken = ready.pop(max(ready))
        yield taken
        for step in taken:
            for following in step.next:
                ready.setdefault(following.height, []).append(following)
            step.next = []


def _follow(tree: _Open, root: Root, before: Step | None, frame: Frame, offset: int) -> Step:
    embeddings, index = frame
    key = (id(before), (embeddings.key, index, offset))
    found = tree.by_path.get(key)
    if found is None:
        found = tree.by_path[key] = Step(root=root, frame=frame, offset=offset)
        (tree.first if before is None else before.next).append(found)
    return found


def _objects(masks_kss: Mapping[int, np.ndarray]) -> int:
    return next((int(mask.shape[0]) for mask in masks_kss.values()), 0)
