# Sourced by the other scripts: makes .venv at the root of the repository and installs genflow there, once.
# usage: source scripts/setup.sh [EXTRAS]   (EXTRAS as in pip: dev, xformers)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-}

python=$(command -v python3 || command -v python || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "genflow needs Python 3.11 or newer; found: $("${python:-false}" --version 2>&1 || echo none)" >&2
    exit 2
fi
begun="$root/.venv/begun-by-setup" # only what was begun here, and cut short, is ever removed
if ! "$root/.venv/bin/python" -c 'import pip' 2>/dev/null; then
    if [ ! -e "$root/.venv" ] || [ -e "$begun" ]; then
        rm -rf "$root/.venv"
        mkdir "$root/.venv"
        touch "$begun"
        "$python" -m venv "$root/.venv"
        rm "$begun"
    elif ! "$root/.venv/bin/python" -m ensurepip >/dev/null 2>&1; then # such as one of uv
        echo "$root/.venv has no pip, and setup.sh did not make it: install pip there, or move it away" >&2
        exit 2
    fi
fi
# The stamp is written last, so that an install that was cut short is done again.
stamp="$root/.venv/installed-${extras:-base}"
wanted=$("$root/.venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$root/pyproject.toml")
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing genflow into $root/.venv (PyTorch is large: a minute or more) ..." >&2
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}"
    echo "$wanted" > "$stamp"
fi
