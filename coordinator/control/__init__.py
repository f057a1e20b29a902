"""The leader's controllers: passive machines that turn what happened into commands and messages."""
