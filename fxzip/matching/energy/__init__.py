"""Methods that choose what to keep by how much of all features it tells."""
