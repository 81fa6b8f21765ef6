from cardiac_qc_plugin.auto3dseg import BayesianAlgo


class BayesunetAlgo(BayesianAlgo):
    """The bundle cardiac_unet_segmentation."""
