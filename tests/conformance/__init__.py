"""One suite for every model family: a table of families, a slow reference, and tests that cross the two."""
