"""Status, plots and HTML report of a run, from the files in its save folder; without torch."""
