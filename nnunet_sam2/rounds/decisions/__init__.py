"""What people decided about labels: kept line by line, held against cases and classes, in force from round to round."""
