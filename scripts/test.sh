#!/usr/bin/env bash
# Sets up a virtual environment, checks style, and runs the tests. Arguments go to pytest.
# ACDC_DIR=... names ACDC's training folder; tests that need it are skipped without.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[test]"
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -q "$@"
