"""The process: device, seeds, signals, files."""
