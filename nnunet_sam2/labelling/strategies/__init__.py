"""The strategies: one file each, or a folder where one has several parts."""
