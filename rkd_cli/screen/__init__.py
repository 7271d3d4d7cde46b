"""Output on terminals and in log files."""
