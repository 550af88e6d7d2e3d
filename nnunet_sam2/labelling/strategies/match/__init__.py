"""Each query slice paired with its most similar support slice."""
