"""The command line: the commands, their flags, what they print."""
