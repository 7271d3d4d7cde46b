"""Our code beside the textbook's."""
