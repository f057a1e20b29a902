"""What people and machines run around the product: set-up, checks, tests, measurements."""
