#!/usr/bin/env bash
# Sets up MONAI Label, and drives its server in tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup_monailabel.sh"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check pytest==9.2.0
exec "$VENV/bin/python" -m pytest -q tests/monailabel "$@"
