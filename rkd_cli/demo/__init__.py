"""The drawn birds and their story."""
