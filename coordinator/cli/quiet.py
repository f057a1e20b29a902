"""Keeps gRPC's own lines off the terminal: clusterctl says in its own words what went wrong. Import it before gRPC."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
