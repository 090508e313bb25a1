"""Pipeline of ``preprocess_data``: input files, tokenization, indexed datasets, resumption."""
