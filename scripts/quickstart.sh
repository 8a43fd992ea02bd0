#!/usr/bin/env bash
# From nothing to pictures: set up .venv, train configs/quickstart.yaml on the embedded emoji, draw a grid.
# Arguments go to the training: scripts/quickstart.sh train.steps=500
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""  # or it would take our own arguments for extras
cd "$root"
"$root/.venv/bin/genflow" train configs/quickstart.yaml "$@"
"$root/.venv/bin/genflow" sample runs/quickstart --prompt-file samples/prompts.txt --out runs/quickstart/pictures
echo "look at $root/runs/quickstart/pictures/grid.png"
