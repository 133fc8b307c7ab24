"""How many features each space keeps: resizable spaces, reconstruction errors, a budget, narrow heads."""
