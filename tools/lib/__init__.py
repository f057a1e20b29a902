"""Parts of the tools; each tool in `tools/` starts one of these modules."""
