"""Heads that tell the tasks apart: one shift of the logits per input, fitted for all of them together."""
