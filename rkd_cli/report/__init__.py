"""The pages that the program makes, and the words they share with the screen."""
