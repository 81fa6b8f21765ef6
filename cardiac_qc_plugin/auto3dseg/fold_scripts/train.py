"""Train this fold and score it; --<setting> <value> replaces a setting of its bundle, from now on.

python scripts/train.py run --config_file configs/hyper_parameters.yaml [--iterations N ...]
"""

from cardiac_qc_plugin.auto3dseg.fold import command_line, train

if __name__ == "__main__":
    command_line(train)
