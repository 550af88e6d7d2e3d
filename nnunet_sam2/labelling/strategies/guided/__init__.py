"""A first mask from the supports' memories guides a second pass."""
