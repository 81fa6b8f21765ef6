"""Segmentation of cardiac cine MRI with detection of local segmentation failures (Sander et al., 2020)."""

__version__ = "0.1.0"
