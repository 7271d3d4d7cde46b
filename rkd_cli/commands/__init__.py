"""What a person asks for beside training: a file a command."""
