"""A label explained from the records that made it."""
