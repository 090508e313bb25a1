"""One run of ``preprocess_data``: loop, output files, journal, status file, resumption."""
