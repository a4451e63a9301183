"""The commands of the command line, one file for each purpose; everything heavy is imported inside a command."""
