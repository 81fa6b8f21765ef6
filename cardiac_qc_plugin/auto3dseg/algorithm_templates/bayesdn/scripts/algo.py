from cardiac_qc_plugin.auto3dseg import BayesianAlgo


class BayesdnAlgo(BayesianAlgo):
    """The bundle cardiac_dn_segmentation."""
