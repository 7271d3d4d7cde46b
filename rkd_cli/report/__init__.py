"""HTML pages and model cards, and text that they share with the screen."""
