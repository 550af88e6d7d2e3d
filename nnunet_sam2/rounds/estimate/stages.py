"""A run's stages in their order, each with what it is expected to take."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.rounds.disk import RunSize, stage_bytes
from nnunet_sam2.rounds.estimate.costs import Cost, StageEstimate
from nnunet_sam2.rounds.estimate.labelling_costs import LabellingCosts
from nnunet_sam2.rounds.estimate.nnunet_costs import NnunetCosts
from nnunet_sam2.rounds.nnunet.light import light_settings
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.trainers.settings import RoundSettings

_FUSION = 3.0
"""Fusing a case's sources and writing its label and confidence, in writings of a case: two are read as well."""


@dataclass(frozen=True, kw_only=True)
class RunEstimator:
    """Lay out a run's stages as `rounds.orchestrator` goes through them, up to the round limit."""

    cohort: Cohort
    options: RunOptions
    validation: tuple[Case, ...]
    supports: tuple[Case, ...]
    labelling: LabellingCosts
    nnunet: NnunetCosts
    size: RunSize
    planned: bool
    """nnU-Net has planned and preprocessed the labelled cases before."""
    unprepared: tuple[Case, ...]
    """The unlabelled cases that are not preprocessed yet: runs of a dataset share those that are."""
    done: Collection[str] = ()
    """Stages that the run's ledger shows as done."""
    features_bytes: int = 0
    """What SAM 2's features will take on the disk beyond those that lie there."""

    def stages(self) -> tuple[StageEstimate, ...]:
        """Return all stages; those that are done cost nothing any more."""
        return tuple(self._stages())

    def _stages(self) -> Iterator[StageEstimate]:
        options, cohort = self.options, self.cohort
        labelled, unlabelled = cohort.labelled, cohort.unlabelled
        yield self._nnunet(
            "setup/plan",
            "nnU-Net plans and preprocesses",
            self.nnunet.plan(labelled, self.unprepared, planned=self.planned),
            self._plan_memory,
            to_results=False,
            writes=not self.planned or bool(self.unprepared),
        )
        yield self._sam2(
            "setup/sam2_quality",
            f"SAM 2 labels the {len(labelled)} labelled cases, each from other patients",
            self._sam2_quality(),
            more_disk=self.features_bytes,
        )
        yield self._sam2("setup/sam2", f"SAM 2 labels {len(unlabelled)} cases", self._sam2_labels())
        if not options.skip_baseline:
            yield from self._training(0, "labelled cases alone", pseudo=())
        for number in range(1, options.round_limit + 1):
            if number > 1 or not options.skip_baseline:
                yield from self._prediction(number - 1)
            if number > 1 and self.validation:
                yield self._sam2(f"r{number:02d}/refine", "SAM 2, prompted by the student", self._refine())
            yield self._fusion(f"r{number:02d}/fuse", f"labels of round {number}")
            yield from self._training(number, "with pseudo-labels", pseudo=unlabelled)
        last = options.round_limit
        if options.has_final:
            yield from self._prediction(last)
            last += 1
            if self.validation:
                yield self._sam2(f"r{last:02d}/refine", "SAM 2, prompted by the student", self._refine())
            yield self._fusion(f"r{last:02d}/fuse", "labels of the last training")
            yield from self._training(last, "the whole schedule, after the last round", pseudo=unlabelled, final=True)
        yield from self._prediction(last)
        yield self._fusion("finish/labels", "final labels")

    def _training(
        self, number: int, what: str, *, pseudo: tuple[Case, ...], final: bool = False
    ) -> Iterator[StageEstimate]:
        settings = self._settings(final=final)
        yield self._nnunet(
            f"r{number:02d}/data",
            "the round's configuration",
            self.nnunet.data(pseudo),
            self._plan_memory,
            to_results=False,
        )
        iterations = settings.num_epochs * settings.num_iterations_per_epoch
        yield self._nnunet(
            f"r{number:02d}/train",
            f"nnU-Net, {iterations} iterations, {what}",
            self.nnunet.train(settings, self.validation),
            self.nnunet.train_memory_bytes(),
            gpu=self.nnunet.gpu_bytes(),
        )

    def _prediction(self, number: int) -> Iterator[StageEstimate]:
        cases = (*self.cohort.unlabelled, *self.validation)
        mirroring = self._settings(final=False).mirroring
        yield self._nnunet(
            f"r{number:02d}/predict",
            f"the student segments {len(cases)} cases",
            self.nnunet.predict(cases, mirroring=mirroring) + Cost.total(self.labelling.write(case) for case in cases),
            self.nnunet.predict_memory_bytes(cases),
            gpu=self.nnunet.gpu_bytes(),
        )
        judged = self.labelling.load(self.supports) + Cost.total(
            self.labelling.judge(case) + self.labelling.load([case]) for case in self.cohort.unlabelled
        )
        yield self._sam2(f"r{number:02d}/quality", "its labels are judged", judged)

    def _fusion(self, stage: str, what: str) -> StageEstimate:
        cost = Cost.total(self.labelling.write(case) * _FUSION for case in self.cohort.unlabelled)
        return self._sam2(stage, what, cost)

    def _sam2_quality(self) -> Cost:
        costs, supports = self.labelling, self.supports
        others = [s for s in supports if s.patient != supports[0].patient] or supports
        cost = costs.start + Cost.total(costs.encode(case) for case in self.cohort.labelled) + costs.prepare(supports)
        checked = [case for case in self.cohort.labelled if any(s.patient != case.patient for s in supports)]
        return cost + Cost.total(costs.label(case, others) + costs.judge(case) + costs.write(case) for case in checked)

    def _sam2_labels(self) -> Cost:
        costs, supports = self.labelling, self.supports
        cost = costs.load(supports) + costs.prepare(supports, again=True)
        return cost + Cost.total(
            costs.encode(case) + costs.label(case, supports) + costs.judge(case) + costs.write(case)
            for case in self.cohort.unlabelled
        )

    def _refine(self) -> Cost:
        costs = self.labelling
        cost = costs.load(self.validation) + costs.refine_prepare(len(self.validation))
        return cost + Cost.total(
            costs.load([case]) + costs.refine(case) + costs.write(case) for case in self.cohort.unlabelled
        )

    def _settings(self, *, final: bool) -> RoundSettings:
        base = self.options.configuration
        plans = {"configurations": {base: {"patch_size": self.nnunet.patch_size}}}
        return self.options.training(light_settings(plans, base), final=final)

    @property
    def _plan_memory(self) -> int:
        cases = (*self.cohort.labelled, *self.cohort.unlabelled)
        return self.nnunet.plan_memory_bytes(cases, len(self.cohort.channels))

    @property
    def _sam2_memory(self) -> int:
        cases = (*self.cohort.labelled, *self.cohort.unlabelled)
        return self.labelling.memory_bytes(cases, len(self.cohort.channels))

    def _sam2(self, stage: str, what: str, cost: Cost, *, more_disk: int = 0) -> StageEstimate:
        disk = stage_bytes(stage, self.size) + more_disk
        return self._estimate(stage, what, cost, self._sam2_memory, int(self.labelling.answer["gpu_bytes"]), disk)

    def _nnunet(
        self,
        stage: str,
        what: str,
        cost: Cost,
        memory: int,
        *,
        gpu: int = 0,
        to_results: bool = True,
        writes: bool = True,
    ) -> StageEstimate:
        # The process of the run waits beside nnU-Net's, and SAM 2 lies in it: on the accelerator with all it has taken.
        waiting = int(self.labelling.answer["start_memory_bytes"])
        gpu += int(self.labelling.answer["gpu_bytes"]) if gpu else 0
        disk = stage_bytes(stage, self.size) if writes else 0
        return self._estimate(stage, what, cost, memory + waiting, gpu, disk, preprocessed=not to_results)

    def _estimate(
        self,
        stage: str,
        what: str,
        cost: Cost,
        memory: int,
        gpu: int,
        disk: int,
        *,
        preprocessed: bool = False,
    ) -> StageEstimate:
        done = stage in self.done
        return StageEstimate(
            stage=stage,
            what=what,
            cost=Cost() if done else cost,
            memory_bytes=0 if done else memory,
            gpu_bytes=0 if done else gpu,
            disk_bytes=0 if done else disk,
            preprocessed=preprocessed,
            done=done,
        )
