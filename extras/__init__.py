"""What a reader of the paper does not need: `python -m extras.NAME`, from the root."""
