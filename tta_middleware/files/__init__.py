"""Lines of files, plain or compressed, read and written so that a kill loses nothing."""
