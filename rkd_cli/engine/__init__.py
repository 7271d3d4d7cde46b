"""From settings to a finished run: build, loop, and what one step is."""
