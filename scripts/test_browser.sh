#!/usr/bin/env bash
# Sets up a virtual environment, and drives the report and the review seat in Chromium. Arguments go to pytest.
# Without a Chromium (CHROMIUM=... names another program), Debian's is installed, which takes root.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[test]"
if [ -z "${CHROMIUM:-}" ] && ! command -v chromium > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium > /dev/null
fi
export CHROMIUM="${CHROMIUM:-$(command -v chromium)}" # named, so that the tests cannot be skipped
exec .venv/bin/python -m pytest -q tests/test_report_browser.py tests/review/test_browser.py "$@"
