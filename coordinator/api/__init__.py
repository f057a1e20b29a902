"""The contract in proto/, as generated code."""
