# Sourced by demo.sh and test.sh: a virtual environment in .venv with this package and its tested dependencies.
# PYTHON chooses the interpreter (3.10 or newer); the first argument is an extra, "[test]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1:-}"
