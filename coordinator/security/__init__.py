"""Who may speak with whom: certificates, TLS, and the table of roles and calls."""
