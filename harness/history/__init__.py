"""Results of many commits, in asv's files: written, read, and kept apart by machine."""
