"""Loaders of the data sets."""
