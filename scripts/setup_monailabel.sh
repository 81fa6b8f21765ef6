# Sourced by monailabel.sh and test_monailabel.sh: MONAI Label in a virtual environment of its own, since it needs other
# versions than the package's tests. VENV names it (.venv-monailabel), PYTHON the interpreter (3.10 or 3.11).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv-monailabel}
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-monailabel.txt
# without sam2, which would build against PyTorch's CUDA packages, and without pydicom 3, which MONAI Label cannot import
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps monailabel==0.8.5 -e .
if ! "$VENV/bin/python" -c "import torchvision.utils" 2> /dev/null; then
    # MONAI Label imports these two at its start, for pictures that only its DeepEdit training draws
    folder=$("$VENV/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torchvision
    mkdir -p "$folder"
    touch "$folder/__init__.py"
    cat > "$folder/utils.py" << 'END'
def make_grid(*_, **__):
    raise ImportError("torchvision is not installed.")


save_image = make_grid
END
fi
