"""The demo: drawn birds, and the networks trained on them."""
