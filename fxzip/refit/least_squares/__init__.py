"""Least squares: the parameters of the zipped network fitted to the features of the models, call by call."""
