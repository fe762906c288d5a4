"""The picture, the page and the tables of a run, from its record files."""
