"""Methods that match features by the weights that write and read them; they need no data."""
