#!/usr/bin/env bash
# Install with the test extra, lint, check types, run the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
cd "$root"
ruff check nnunet_sam2 scripts tests
mypy
exec python -m pytest "$@"
