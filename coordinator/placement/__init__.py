"""See coordinator/README.md."""
