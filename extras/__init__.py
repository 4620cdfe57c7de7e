"""Beyond the paper: `python -m extras.NAME`, from the root."""
