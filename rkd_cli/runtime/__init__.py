"""Devices, processes, seeds, signals and files."""
