"""Studies: tables of runs, what is compared with what in them, and the pages that say what was found."""
