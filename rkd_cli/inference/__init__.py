"""What a trained network is used for."""
