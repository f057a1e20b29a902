"""The replicated state machine. Pure: nothing here reads a clock, a file or a socket."""
