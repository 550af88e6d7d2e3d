#!/usr/bin/env bash
# Run the minutes-long tests, nightly, and write their result to docs/reliability/last_long.json and docs/reliability.md.
# Arguments go to pytest; the result is written only where all long tests were asked for.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
cd "$root"
if [ $# -gt 0 ]; then
    exec python -m pytest -m long "$@"
fi
results="$(mktemp --suffix=.xml)"
trap 'rm -f "$results"' EXIT
status=0
python -m pytest -m long -o junit_family=xunit1 --junitxml="$results" || status=$?
python scripts/long_result.py "$results"
exit "$status"
