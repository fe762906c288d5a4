"""The model's operations: a plain torch reference each, and the fast paths that take its place on a GPU."""
