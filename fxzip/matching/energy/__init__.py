"""Methods that choose what to keep by how much variance it leaves unexplained."""
