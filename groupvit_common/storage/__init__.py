"""Files on disk: bounded reading, sets of files that are saved whole, locks."""
