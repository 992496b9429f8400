"""What a function does to every axis of its values, read off its traced program."""
