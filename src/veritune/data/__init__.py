"""Raw labelled rows in, a frozen dataset out."""
