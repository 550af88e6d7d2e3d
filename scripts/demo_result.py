"""Score the demo's run, write result.json and print the table. Usage: demo_result.py DATASET RESULT_JSON"""

from __future__ import annotations

import sys
from pathlib import Path

from scoring import score_run

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.folders import find_dataset
from nnunet_sam2.rounds.state import read_state
from nnunet_sam2.storage import write_json


def main() -> None:
    """Score, write and print."""
    folders = find_dataset(sys.argv[1])
    target = Path(sys.argv[2])
    cohort = Cohort.load(folders.raw)
    state = read_state(folders)
    result = score_run(folders, cohort, state, threads=2, out=target.parent / "test_predictions")
    result["sam2_checkpoint"] = state.options["sam2"]
    write_json(target, result)

    print(f"\n{'':<28}{'Dice':>7}   of")
    print(f"{'labelled-only nnU-Net':<28}{result['labelled_only']['dice']:>7.3f}   {len(cohort.test)} test cases")
    print(f"{'raw SAM 2 labels':<28}{result['sam2']['dice']:>7.3f}   {len(cohort.unlabelled)} unlabelled cases")
    for entry in result["rounds"]:
        kept = " (kept)" if entry["round"] == state.best_round else ""
        print(f"{'round ' + str(entry['round']) + kept:<28}{entry['dice']:>7.3f}   {len(cohort.test)} test cases")
    print(f"{'final labels':<28}{result['final_labels']['dice']:>7.3f}   {len(cohort.unlabelled)} unlabelled cases")
    print(f"\nstopped: {state.stop_reason}")
    print(f"the run, its ledger and labels: {state.folder}")
    print(f"the model kept:                 {folders.results}/*__{state.configuration_of()}")
    print(f"this table:                     {target}")


if __name__ == "__main__":
    main()
