from cardiac_qc_plugin.auto3dseg import BayesianAlgo


class BayesdrnAlgo(BayesianAlgo):
    """The bundle cardiac_drn_segmentation."""
