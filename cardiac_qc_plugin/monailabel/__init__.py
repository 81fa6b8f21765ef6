"""App for MONAI Label (docs/monailabel.md): start its server with this folder as ``--app``."""
