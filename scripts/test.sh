#!/usr/bin/env bash
# Sets up a virtual environment, checks style, and runs the tests. Arguments go to pytest.
# ACDC_DIR=... names ACDC's training folder; tests that need it are skipped without. Two processes share the tests;
# "-n 0" keeps them in one.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[test]"
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
