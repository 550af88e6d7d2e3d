"""Auto: what the evidence favours: transfer between close-ups, seen from every side that shows the volume well."""
