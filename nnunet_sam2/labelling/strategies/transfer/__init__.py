"""Label transfer by nearest neighbours in embedding space."""
