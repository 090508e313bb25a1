"""The steps of ``preprocess_data``: from input files to indexed datasets."""
