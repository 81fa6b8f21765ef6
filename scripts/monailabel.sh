#!/usr/bin/env bash
# Sets up MONAI Label, and starts its server with this package's app on a folder of images (docs/monailabel.md).
# Usage: bash scripts/monailabel.sh STUDIES [--app FOLDER] [other options of "monailabel start_server"]
if [ $# = 0 ]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
case $1 in http*) studies=$1 ;; *) studies=$(realpath -m "$1") ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup_monailabel.sh"
# zoo_source: the stock app must not ask for a list of bundles in the network
exec "$VENV/bin/python" -m monailabel.main start_server --app cardiac_qc_plugin/monailabel --studies "$studies" \
    --host 127.0.0.1 --conf zoo_source ngc --conf sam2 false "${@:2}"
