"""What can be known of a kernel without a GPU: compiled for each target, read from the binary, judged, kept."""
