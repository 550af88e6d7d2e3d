"""The person in the loop: what to look at first, what was decided, and labels that were corrected by hand."""
