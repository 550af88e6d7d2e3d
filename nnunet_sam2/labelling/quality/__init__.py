"""How good a pseudo-label is, told without its ground truth."""
