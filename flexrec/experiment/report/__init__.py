"""The report of a run, or of several: one page that needs nothing else, and pictures of its figures."""
