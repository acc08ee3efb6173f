"""Refit placed weights into MAP form: the converter, the statistics of layer inputs, norms, the folder it writes."""
