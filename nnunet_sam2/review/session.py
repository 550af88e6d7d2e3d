"""A review as it goes on: the page of the newest labels, and each decision entered the moment it is made."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.report.account import RunAccount
from nnunet_sam2.report.gather import gather
from nnunet_sam2.report.page import Pictures, ReviewPage, render
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.report.words import CaseWord, words_of
from nnunet_sam2.report.write import pictures_of
from nnunet_sam2.review.order import Rank, Signs, in_order, rank_case
from nnunet_sam2.review.signs import signs_of_run
from nnunet_sam2.rounds.decisions.record import Decision, DecisionFile, accepted_path
from nnunet_sam2.rounds.ledger import LEDGER_FILE
from nnunet_sam2.storage import atomic_path, file_hash


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Hold what was read of the run for one state of its ledger."""

    mark: tuple[int, int]
    files: RunFiles
    account: RunAccount
    pictures: Pictures
    signs: Mapping[str, Mapping[int, Signs]]
    labels: Mapping[str, tuple[Path, str]]
    """The label file that is shown of each case, and its hash."""


class ReviewSession:
    """Show a run's labels and take decisions about them; safe to call from several threads."""

    def __init__(
        self, folders: DatasetFolders, run: Path, decisions: DecisionFile, *, most_pictures: int | None = None
    ) -> None:
        self.folders = folders
        self.run = run
        self._decisions = decisions
        self._most_pictures = most_pictures
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self._seen = self._read(None)

    def page(self) -> str:
        """Render the page, of newer labels where the run has gone on."""
        with self._reading:  # pictures of many cases take their time, and decisions do not wait for them
            if self._seen.mark != self._mark():
                seen = self._read(self._seen)
                with self._lock:
                    self._seen = seen
        with self._lock:
            seen, cases = self._seen, self._cases()
            first = [(name, "; ".join(case["why"])) for name, case in cases.items() if case["open"]]
            data = {
                "cases": cases,
                "undo": self._undo_text(),
                "seen": self.entries(),
                "dataset": self.folders.dataset_id,
                "run": self.run.name,
            }
            return render(seen.account, seen.pictures, ReviewPage(data=data, first=first, notice=_notice(seen.account)))

    def state(self) -> dict[str, Any]:
        """Return what stands for every case, as a JSON value."""
        with self._lock:
            return {
                "cases": self._cases(),
                "undo": self._undo_text(),
                "seen": self.entries(),
                "newer": self._newer(),
            }

    def entries(self) -> int:
        """Return how many entries the decisions have: the number by which a page knows whether it is up to date."""
        return len(self._decisions.lines)

    def decide(self, *, case_id: str, decision: str, classes: Sequence[int], label: str, seen: int) -> dict[str, Any]:
        """Enter a decision about the label with the hash ``label`` and return the new state.

        Raises `InputError` for a case, class or decision that there is not, for a class that a person drew by hand,
        where the label is no longer the one that was shown, and where something was decided of the case since the
        first ``seen`` entries.
        """
        with self._lock:
            try:
                kind = Decision(decision)
            except ValueError:
                kind = Decision.UNDO
            if kind is Decision.UNDO:
                raise InputError(f"there is no decision {decision!r}")
            if case_id not in self._seen.labels:
                raise InputError(f"case {case_id!r} has no label to decide about")
            strangers = sorted(set(classes) - set(self._seen.files.cohort.class_values))
            if strangers:
                raise InputError(f"there is no class {strangers[0]}")
            if (kind in (Decision.ACCEPT, Decision.REJECT)) is not bool(classes) and kind is not Decision.CLEAR:
                raise InputError(f"{kind.value} {'needs a class' if not classes else 'is for a whole case'}")
            path, known = self._seen.labels[case_id]
            if label != known:
                raise InputError(f"case {case_id} has another label than the one that you saw; load the page again")
            self._refuse_overtaken(case_id, seen)
            if kind in (Decision.ACCEPT, Decision.REJECT):
                self._refuse_drawn(case_id, kind, classes)
            if kind is Decision.ACCEPT:
                self._keep(case_id, path, known)
            self._decisions.append(kind, case_id=case_id, classes=sorted(set(classes)), label=known)
            return self.state()

    def undo(self, *, seen: int | None = None) -> dict[str, Any]:
        """Take the last decision back and return the new state, with the case that it was about.

        Raises `InputError` where there is none, and where it was entered after the first ``seen`` entries.
        """
        with self._lock:
            last = self._decisions.last_that_counts
            if last is None:
                raise InputError("there is no decision to take back")
            self._refuse_overtaken(last.case_id, self.entries() if seen is None else seen)
            self._decisions.append(Decision.UNDO, undoes=last.number)
            return {**self.state(), "case": last.case_id}

    def _refuse_overtaken(self, case_id: str, seen: int) -> None:
        """Refuse what was decided before its page knew what another page had entered about the case."""
        lines = self._decisions.lines
        about = {line.number: line.case_id for line in lines}
        newer = [line for line in lines[max(0, seen) :] if (line.case_id or about.get(line.undoes or 0)) == case_id]
        if newer:
            names = self._seen.files.class_names
            said = "; ".join(
                f"{line.decision.value} {', '.join(names.get(value, str(value)) for value in line.classes)}".strip()
                for line in newer
            )
            raise InputError(f"case {case_id} was decided elsewhere since you saw it ({said}); it is shown now")

    def _mark(self) -> tuple[int, int]:
        status = (self.run / LEDGER_FILE).stat()
        return status.st_mtime_ns, status.st_size

    def _newer(self) -> bool:
        """Say whether the run has other labels than those that are shown; most of what it enters leaves them alone."""
        if self._seen.mark == self._mark():
            return False
        return _labels(RunFiles.open(self.folders, self.run)) != self._seen.labels

    def _read(self, before: _Seen | None) -> _Seen:
        mark = self._mark()
        files = RunFiles.open(self.folders, self.run)
        account, labels = gather(files), _labels(files)
        if before is not None and (before.labels, before.files.cohort) == (labels, files.cohort):
            pictures = before.pictures
        else:
            pictures = pictures_of(files, account, self._most_pictures)
        return _Seen(
            mark=mark,
            files=files,
            account=account,
            pictures=pictures,
            signs=signs_of_run(files, account),
            labels=labels,
        )

    def _words(self) -> dict[str, CaseWord]:
        """Return what people have said of each case; human labels may have come since the page was loaded."""
        held_out = self._seen.files.held_out_patients
        return words_of(Cohort.load(self.folders.raw), self._decisions.lines, held_out_patients=held_out)

    def _refuse_drawn(self, case_id: str, kind: Decision, classes: Sequence[int]) -> None:
        """Refuse to decide about classes that a person drew: the human label is the last word on them."""
        word = self._words().get(case_id, CaseWord())
        names = self._seen.files.class_names
        drawn = ", ".join(names.get(value, str(value)) for value in sorted(word.drawn & set(classes)))
        if drawn:
            raise InputError(
                f"a person drew {drawn} of case {case_id} by hand, so there is nothing to {kind.value}; import another "
                "label with nnunet_sam2 review --import --replace, or take the case out"
            )

    def _cases(self) -> dict[str, dict[str, Any]]:
        """Say of every case that has a label what stands, what is open, and what looking at that is worth."""
        words = self._words()
        found = {}
        for name, (_, label) in self._seen.labels.items():
            word = words.get(name, CaseWord())
            signs = {}
            if not word.decisions.taken_out:
                for value, own in self._seen.signs.get(name, {}).items():
                    if not word.settles(value, label):
                        signs[value] = Signs(again=True) if word.again(value, label) else own
            found[name] = (rank_case(signs, self._seen.account.class_names), word, label)
        ranks = {name: rank for name, (rank, *_) in found.items()}
        return {name: _case(*found[name]) for name in in_order(ranks)}

    def _undo_text(self) -> str:
        last = self._decisions.last_that_counts
        return "" if last is None else f"{last.decision.value} {last.case_id}"

    def _keep(self, case_id: str, path: Path, expected: str) -> None:
        """Keep the label file as it was accepted: later labels may take its place."""
        kept = accepted_path(self.run, case_id, expected, self._seen.files.cohort.file_ending)
        if kept.is_file() and file_hash(kept) == expected:
            return
        if not path.is_file() or file_hash(path) != expected:
            raise InputError(f"{path} has changed since it was shown; load the page again")
        with atomic_path(kept) as temporary:
            shutil.copyfile(path, temporary)


def _labels(files: RunFiles) -> dict[str, tuple[Path, str]]:
    """Find the newest label file of each case that the run labels, and its hash."""
    found = {case.case_id: files.newest_label(case) for case in files.cohort.unlabelled}
    return {name: label for name, label in found.items() if label is not None}


def _case(rank: Rank, word: CaseWord, label: str) -> dict[str, Any]:
    decisions = word.decisions
    return {
        "label": label,
        "worth": round(rank.value, 4),
        "why": list(rank.why),
        "open": {str(value): round(worth, 4) for value, worth in rank.by_class.items()},
        "taken_out": decisions.taken_out,
        "accepted": list(decisions.accepted),
        "rejected": list(decisions.rejected),
        "again": [value for value in decisions.rejected if word.again(value, label)],
        "drawn": sorted(word.drawn),
    }


def _notice(account: RunAccount) -> str:
    when = (
        "The run has ended: the same nnunet_sam2 run command goes on with another round, in which they hold."
        if account.stop_reason
        else "They hold from the next round on that the run begins."
    )
    return (
        f"Every decision is saved at once. {when} Accepted classes stay as they are, with full confidence; of rejected "
        "ones nothing is learnt; a case that is taken out is not used."
    )
