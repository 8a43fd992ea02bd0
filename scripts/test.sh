#!/usr/bin/env bash
# Set up, check style and types, run the tests, one process a core. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
cd "$root"
bin="$root/.venv/bin"
"$bin/ruff" check genflow scripts tests
"$bin/mypy" genflow
"$bin/python" -m pytest -q -n logical --maxprocesses 8 --dist worksteal "$@"
