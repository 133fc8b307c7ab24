"""Refits that reset statistics: BatchNorm, REPAIR, statistics as they are on the data."""
