"""The `tpserve` command."""
