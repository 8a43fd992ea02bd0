#!/usr/bin/env bash
# From nothing to pictures: set up .venv, train configs/quickstart.yaml on the embedded emoji, draw a grid.
# Arguments go to the training: scripts/quickstart.sh train.steps=500
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""  # or it would take our own arguments for extras
cd "$root"
run=runs/quickstart
for word in "$@"; do
    case $word in out=*) run=${word#out=} ;; esac
done
"$root/.venv/bin/genflow" train configs/quickstart.yaml "$@"
"$root/.venv/bin/genflow" sample "$run" --prompt-file samples/prompts.txt --out "$run/pictures"
echo "look at $(realpath "$run")/pictures/grid.png"
