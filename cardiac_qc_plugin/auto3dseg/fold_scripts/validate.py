"""Score this fold's weights on its validation scans.

python scripts/validate.py run --config_file configs/hyper_parameters.yaml
"""

from cardiac_qc_plugin.auto3dseg.fold import command_line, validate

if __name__ == "__main__":
    command_line(validate)
