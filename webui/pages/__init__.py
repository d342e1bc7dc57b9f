"""One file per page: layout and thin handlers."""
