"""Generated from proto/coordinator/api/v1 by `tools/generate`; do not edit."""
