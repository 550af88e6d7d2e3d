"""When a run ends: labels that settled, labels that collapsed, each by its name and with its evidence."""
