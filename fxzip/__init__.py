"""fxzip."""
