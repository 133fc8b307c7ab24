"""Methods that match features by what they do on data."""
