"""Where Auto3DSeg looks for the class that predicts with this fold's weights."""

from cardiac_qc_plugin.auto3dseg.fold import FoldInferer as InferClass

__all__ = ["InferClass"]
