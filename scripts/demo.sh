#!/usr/bin/env bash
# Sets up a virtual environment and finds the segmentation failures of a synthetic heart.
# Usage: bash scripts/demo.sh [OUTPUT FOLDER]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec .venv/bin/python scripts/pipeline.py demo --output "${1:-runs/demo}"
